"""`cmai-fast report`: rewrites the report from results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmai_fast.cli import options
from cmai_fast.cli.summary import print_path

EXAMPLE = "cmai-fast report runs/a"


def report(
    *,
    results: Annotated[Path, typer.Argument(help="A results.json, or the folder that holds one.")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write. - is standard output.", show_default="report.html beside it"),
    ] = None,
) -> None:
    """Write report.html again from results.json; nothing is run."""
    from cmai_fast.evaluation.results import read_results
    from cmai_fast.report import render_report, write_report

    folder = results if results.is_dir() else results.parent
    if options.is_stdout(out):
        typer.echo(render_report(read_results(results)), nl=False)
        return
    print_path("Report", write_report(read_results(results), out or folder / "report.html"))
