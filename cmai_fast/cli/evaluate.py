"""`cmai-fast evaluate`: the attack suite on one model, or on several side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cmai_fast.cli import lists, options
from cmai_fast.cli.summary import print_summary

EXAMPLE = (
    "cmai-fast evaluate --model runs/a/model --against easyvqa-llava --data easyvqa --eps 8/255 --limit 500 "
    "--out runs/a-eval"
)


def evaluate(
    ctx: typer.Context,
    *,
    show: Annotated[bool, options.lister(lists.evaluation, "Show tasks, data formats, metrics and suites.")] = False,
    model: options.Model,
    against: Annotated[
        list[str] | None,
        typer.Option(help="A model to compare with, the undefended one first; may be given several times."),
    ] = None,
    data: options.Data = "easyvqa",
    fields: options.Map = None,
    split_seed: options.SplitSeed = None,
    split: options.Split = None,
    missing: options.Missing = 0,
    task: options.Task = "vqa",
    metric: options.Metric = None,
    threat: options.Threat = "input",
    eps: options.Eps = None,
    norm: options.Norm = "linf",
    suite: Annotated[
        str | None,
        typer.Option(
            help="A standard set of attacks; --list shows them.",
            show_default="PGD of --steps and --restarts, and APGD of twice the steps",
        ),
    ] = None,
    steps: options.AttackSteps = 50,
    restarts: options.Restarts = 2,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="NAME[:STEPS[xRESTARTS]]",
            help="An attack that joins the suite (attack --list), such as adaptive, which knows the guard; may be "
            "given several times.",
        ),
    ] = None,
    limit: options.Limit = 500,
    batch_size: options.BatchSize = 64,
    max_new_tokens: options.MaxNewTokens = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder for results.json and report.html. - prints results.json to standard output."),
    ],
    resume: options.Resume = False,
    progress: options.Progress = True,
) -> None:
    """Measure accuracy, clean and under the attack suite, and detection; write a report."""
    ball = options.read_threat(norm, eps, threat)
    source = options.read_data(data, fields, split_seed, split, missing)
    options.check([model, *(against or ())], source, task=task, metrics=metric, attacks=also)
    if suite is not None:
        _check_suite(ctx, suite)
    printed = options.is_stdout(out)
    if printed and resume:
        raise ValueError("--out - has nothing to resume; name the folder of the interrupted run")

    from cmai_fast.evaluation.suite import AttackSpec
    from cmai_fast.workflows import evaluate as workflow

    joined = [AttackSpec.parse(named) for named in also or ()]
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside, "run") if printed else out
        results = workflow.evaluate(
            model, source, ball,
            against=against or (), suite=suite, also=joined, out=folder, limit=limit, steps=steps, restarts=restarts,
            batch_size=batch_size, seed=seed, task=task, metrics=metric or (), max_new_tokens=max_new_tokens,
            resume=resume, device=device, dtype=dtype, attention=attention, progress=progress, command=ctx.obj,
        )  # fmt: skip
        if printed and options.is_first():
            typer.echo((folder / "results.json").read_text(encoding="utf-8"), nl=False)
    if not printed and options.is_first():
        print_summary(results, out)


def _check_suite(ctx: typer.Context, suite: str) -> None:
    """Raises ValueError for an unknown suite, or for a budget beside it."""
    from cmai_fast.evaluation.suites import SUITES

    SUITES.check(suite)
    for name in ("steps", "restarts"):
        if ctx.get_parameter_source(name).name != "DEFAULT":  # type: ignore[union-attr]
            raise ValueError(f"--suite {suite} has budgets of its own; leave --{name} out")
