"""`cmai-fast calibrate`: a verifier for a model, and the threshold of its guard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cmai_fast.cli import options
from cmai_fast.cli.summary import print_path
from cmai_fast.threat import parse_eps

EXAMPLE = "cmai-fast calibrate --model runs/a/model --data easyvqa --false-rejection-rate 0.05 --out cmcv"


def calibrate(
    ctx: typer.Context,
    *,
    model: options.Model,
    data: options.Data = "easyvqa",
    fields: options.Map = None,
    split_seed: options.SplitSeed = None,
    split: options.Split = None,
    missing: options.Missing = 0,
    task: options.Task = "vqa",
    heads: options.Heads = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit a new verifier even if there is one.")] = False,
    verifier_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Batches that a new verifier is fitted on; 0: none, the score is S_c of heads.",
            show_default="300",
        ),
    ] = None,
    tower: Annotated[
        str,
        typer.Option(
            help="What the verifier sees with: copy (of the vision side, hardened with it), own (of an immunised "
            "model), the name of an immunised model, or a vision encoder (folder or hub id), such as a robust CLIP."
        ),
    ] = "copy",
    eps: Annotated[
        str, typer.Option(help="Radius of the attacks that the verifier is hardened against, such as 8/255.")
    ] = "8/255",
    head_steps: Annotated[int, typer.Option(min=1, help="Batches that new heads are fitted on.")] = 300,
    false_rejection_rate: Annotated[
        float, typer.Option(min=0, max=0.999, help="Share of clean inputs that may be rejected.")
    ] = 0.05,
    limit: Annotated[int, typer.Option(min=1, help="Calibration samples to use, drawn with the seed.")] = 1000,
    batch_size: options.BatchSize = 64,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    out: Annotated[Path, typer.Option(help="Folder for verifier and threshold; guard takes it as --heads.")],
    progress: options.Progress = True,
) -> None:
    """Set the threshold of a guard, and fit a verifier if the model has none.

    The verifier is fitted on the train split; the threshold is set on the calibration split, with the answers that the
    model generates. The length of these answers is saved with it. A dual encoder gets consistency heads instead.
    """
    options.is_stdout(out, "verifier and threshold")
    source = options.read_data(data, fields, split_seed, split, missing)
    options.check(
        [model, *([] if tower in ("copy", "own") else [tower])],
        source,
        ("calibration", "train") if refit else ("calibration",),
        task,
    )

    radius = parse_eps(eps)

    from cmai_fast.workflows import calibrate as workflow

    record = workflow.calibrate(
        model, source,
        out=out, heads=heads, refit=refit, head_steps=head_steps, verifier_steps=verifier_steps, tower=tower,
        eps=radius, false_rejection_rate=false_rejection_rate, task=task, limit=limit, batch_size=batch_size,
        max_new_tokens=max_new_tokens, seed=seed, device=device, dtype=dtype, attention=attention, progress=progress,
        command=ctx.obj,
    )  # fmt: skip
    threshold, wrong = record["threshold"], record["wrong_answers"]
    said = f"Threshold {threshold['tau']:.3f}: rejects at most {false_rejection_rate:.1%} of clean inputs like the "
    said += f"{threshold['samples']} that it was set on"
    if wrong is not None:
        said += f", and {wrong['rejected']:.1%} of wrong answers (AUROC {wrong['auroc']:.2f})"
    Console(highlight=False).print(f"{said}.")
    print_path("Verifier and threshold", out)
