"""`cmai-fast attack`: one attack on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cmai_fast.cli import lists, options
from cmai_fast.cli.summary import print_path

EXAMPLE = (
    "cmai-fast attack --model runs/a/model --data easyvqa --attack pgd --eps 8/255 --steps 50 --limit 500 --out a.json"
)


def attack(
    ctx: typer.Context,
    *,
    show: Annotated[bool, options.lister(lists.attacks, "Show the attacks, their norms and their settings.")] = False,
    model: options.Model,
    data: options.Data = "easyvqa",
    fields: options.Map = None,
    split_seed: options.SplitSeed = None,
    split: options.Split = None,
    missing: options.Missing = 0,
    task: options.Task = "vqa",
    metric: options.Metric = None,
    attack: Annotated[str, typer.Option(help="Name of an attack; --list shows them.")] = "pgd",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the attack; may be given several times."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="A text that the model has to give, for a targeted attack.", show_default="any wrong answer"),
    ] = None,
    threat: options.Threat = None,
    eps: options.Eps = None,
    norm: options.Norm = "linf",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps.", show_default="the attack's own")] = None,
    restarts: options.Restarts = 1,
    limit: options.Limit = 500,
    batch_size: options.BatchSize = 64,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    out: Annotated[
        Path, typer.Option(help="JSON file to write: totals, settings, a verdict per sample. - is standard output.")
    ],
    save_images: Annotated[
        Path | None,
        typer.Option(help="New folder for an adversarial set: attacked and clean images as PNGs, a manifest."),
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(metavar="TOOL", help="Write the set for garak or pyrit too; may be given several times."),
    ] = None,
    resume: options.Resume = False,
    progress: options.Progress = True,
) -> None:
    """Attack a model on test samples."""
    ball = options.read_threat(norm, eps, threat)
    own = options.pairs(settings or (), "--set")
    source = options.read_data(data, fields, split_seed, split, missing)

    from cmai_fast.attacks import ATTACKS

    ATTACKS.check(attack)
    options.check([model], source, task=task, metrics=metric)
    if ATTACKS[attack].unbounded:
        ball = options.read_threat(norm, eps or "1", threat or "upload")

    from cmai_fast.report.words import percent
    from cmai_fast.workflows import attack as workflow

    record = workflow.attack(
        model, source, attack, ball,
        steps=steps, restarts=restarts, settings=own, target=target, task=task, metrics=metric or (), limit=limit,
        seed=seed, batch_size=batch_size, max_new_tokens=max_new_tokens, out=out, save_images=save_images,
        export=export or (), resume=resume, device=device, dtype=dtype, attention=attention, progress=progress,
        command=ctx.obj,
    )  # fmt: skip
    if not options.is_first():
        return
    shares = {name: percent(record[name]) for name in ("acc_clean", "acc_robust", "asr")}
    reached = "" if target is None else f" The target was given by {percent(record['asr_target'])} of those attacked."
    Console(highlight=False, stderr=options.is_stdout(out)).print(
        f"{record['n']} samples: clean accuracy {shares['acc_clean']}, robust accuracy {shares['acc_robust']}, "
        f"attack success {shares['asr']}.{reached}"
    )
    if not options.is_stdout(out):
        print_path("Results", out)
    if save_images is not None and not options.is_stdout(out):
        print_path("Images", save_images)
