"""`cmai-fast demo`: a short immunisation of the bundled model, small enough for two cores and twelve minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cmai_fast.cli import options
from cmai_fast.cli.summary import print_summary

EXAMPLE = "cmai-fast demo --out runs/demo"

# Fields of ImmunizeSettings that differ from its defaults.
DEMO: dict[str, Any] = {
    "model": "easyvqa-llava",
    "data": "easyvqa",
    "eps": 8 / 255,
    "max_steps": 400,
    "batch_size": 32,
    "save_steps": 100,
    "attack_steps": 20,
    "restarts": 1,
    "limit": 200,
}


def demo(
    ctx: typer.Context,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted demo resumes there.")] = Path(
        "runs/demo"
    ),
    progress: options.Progress = True,
) -> None:
    """Immunise the bundled model on real data, in minutes, and write a report."""
    options.is_stdout(out, "model, results and report")
    console = Console(highlight=False)
    if (out / "results.json").is_file():
        _show_finished(out)
        console.print(f"This demo is finished. To run it again, delete {out} or name another folder with --out.")
        return
    console.print(
        f"Immunising {DEMO['model']} on {DEMO['data']}: {DEMO['max_steps']} steps of training, then "
        f"{DEMO['limit']} test questions under attack, before and after. Ctrl-C interrupts; the same command resumes."
    )
    from cmai_fast.workflows import immunize as workflow

    settings = workflow.ImmunizeSettings(**DEMO, command=ctx.obj)
    try:
        results = workflow.immunize(settings, out, resume=True, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"resume with: {ctx.obj}") from None
    print_summary(results, out)


def _show_finished(out: Path) -> None:
    from cmai_fast.evaluation.results import read_results
    from cmai_fast.report import write_report

    results = read_results(out)
    if not (out / "report.html").is_file():  # interrupted between the two
        write_report(results, out / "report.html")
    print_summary(results, out)
