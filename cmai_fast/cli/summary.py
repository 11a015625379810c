"""The last lines of a command: the main numbers, and the paths of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_summary(results: Any, folder: Path) -> None:
    """The table of models of `results`, their finding as one sentence, and the path of the report in `folder`."""
    from cmai_fast.evaluation.results import upgrade_results
    from cmai_fast.report.findings import finding
    from cmai_fast.report.words import percent

    results = upgrade_results(results)
    table = Table("model", "clean accuracy", "robust accuracy", "attack success")
    for model in results["models"]:
        shares = (percent(model.get(name)) for name in ("acc_clean", "acc_robust", "asr"))
        table.add_row(escape(model["name"]), *shares)
    console = Console(highlight=False)
    console.print(table)
    console.print(finding(results), markup=False)
    print_path("Report", folder / "report.html")


def print_path(what: str, path: Path) -> None:
    """One line that is never wrapped, so that the path can be copied."""
    Console(highlight=False, markup=False).print(f"{what}: {path}", soft_wrap=True)
