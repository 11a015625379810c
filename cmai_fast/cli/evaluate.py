"""`cmai-fast evaluate`: the attack suite on one model, or on two of them side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmai_fast.cli import options
from cmai_fast.cli.summary import print_summary

EXAMPLE = (
    "cmai-fast evaluate --model runs/a/model --against easyvqa-llava --data easyvqa --eps 8/255 --limit 500 "
    "--out runs/a-eval"
)


def evaluate(
    ctx: typer.Context,
    *,
    model: options.Model,
    against: Annotated[str | None, typer.Option(help="The undefended model to compare with.")] = None,
    data: options.Data = "easyvqa",
    eps: options.Eps = options.EPS,
    norm: options.Norm = "linf",
    steps: options.AttackSteps = 50,
    restarts: options.Restarts = 2,
    limit: options.Limit = 500,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")],
    progress: options.Progress = True,
) -> None:
    """Measure accuracy, clean and under the attack suite, and detection; write a report."""
    threat = options.read_threat(norm, eps)

    from cmai_fast.evaluation import experiment

    results = experiment.evaluate(
        model,
        data,
        threat,
        against=against,
        out=out,
        limit=limit,
        steps=steps,
        restarts=restarts,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        attention=attention,
        progress=progress,
        command=ctx.obj,
    )
    print_summary(results, out)
