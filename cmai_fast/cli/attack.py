"""`cmai-fast attack`: one attack on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cmai_fast.cli import options
from cmai_fast.cli.summary import print_path

EXAMPLE = (
    "cmai-fast attack --model runs/a/model --data easyvqa --attack pgd --eps 8/255 --steps 50 --limit 500 --out a.json"
)


def attack(
    ctx: typer.Context,
    *,
    model: options.Model,
    data: options.Data = "easyvqa",
    attack: Annotated[str, typer.Option(help="fgsm, pgd, mi-fgsm or apgd.")] = "pgd",
    eps: options.Eps = options.EPS,
    norm: options.Norm = "linf",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps.", show_default="50, and 1 for fgsm")] = None,
    restarts: options.Restarts = 1,
    limit: options.Limit = 500,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    out: Annotated[Path, typer.Option(help="JSON file to write: totals, settings, and a verdict per question.")],
    progress: options.Progress = True,
) -> None:
    """Attack a model on test questions."""
    threat = options.read_threat(norm, eps)

    from cmai_fast.evaluation import experiment
    from cmai_fast.report.words import percent

    record = experiment.attack(
        model,
        data,
        attack,
        threat,
        steps=steps or (1 if attack == "fgsm" else 50),
        restarts=restarts,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        out=out,
        device=device,
        dtype=dtype,
        attention=attention,
        progress=progress,
        command=ctx.obj,
    )
    shares = {name: percent(record[name]) for name in ("acc_clean", "acc_robust", "asr")}
    Console(highlight=False).print(
        f"{record['n']} questions: clean accuracy {shares['acc_clean']}, robust accuracy {shares['acc_robust']}, "
        f"attack success {shares['asr']}."
    )
    print_path("Results", out)
