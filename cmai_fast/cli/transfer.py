"""`cmai-fast transfer`: a saved adversarial set on another model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cmai_fast.cli import options
from cmai_fast.cli.summary import print_path

EXAMPLE = "cmai-fast transfer attacked --model easyvqa-llava-immune --out transfer.json"


def transfer(
    ctx: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(help="A folder that attack --save-images has written.")],
    model: options.Model,
    batch_size: options.BatchSize = 64,
    max_new_tokens: options.MaxNewTokens = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    out: Annotated[
        Path, typer.Option(help="JSON file to write: totals, both models, a verdict per sample. - is standard output.")
    ],
) -> None:
    """Score a saved adversarial set on a model; nothing is attacked."""
    options.check([model])

    from cmai_fast.report.words import percent
    from cmai_fast.workflows import transfer as workflow

    record = workflow.transfer(
        model, folder,
        out=out, batch_size=batch_size, max_new_tokens=max_new_tokens, device=device, dtype=dtype, attention=attention,
        command=ctx.obj,
    )  # fmt: skip
    moved, strict = record["transfer"], record["strict"]
    Console(highlight=False, stderr=options.is_stdout(out)).print(
        f"{record['n']} samples made on {record['source']['model']}: clean accuracy {percent(record['acc_clean'])}, "
        f"transfer {percent(moved['asr'])} of {moved['attacked']} right ones, strict transfer {percent(strict['asr'])} "
        f"of {strict['attacked']} that broke the source."
    )
    if not options.is_stdout(out):
        print_path("Results", out)
