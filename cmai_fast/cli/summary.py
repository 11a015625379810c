"""What a command says when it is done: the numbers that matter, and where the rest is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(results: dict[str, Any], folder: Path) -> None:
    """The before/after table of `results`, their finding as one sentence, and the path of the report in `folder`."""
    from cmai_fast.evaluation import findings

    table = Table("model", "clean accuracy", "robust accuracy", "attack success")
    for key, model in findings.measured(results):
        shares = (findings.percent(model.get(name)) for name in ("acc_clean", "acc_robust", "asr"))
        table.add_row(findings.model_name(results, key), *shares)
    console = Console(highlight=False)
    console.print(table)
    console.print(findings.finding(results))
    print_path("Report", folder / "report.html")


def print_path(what: str, path: Path) -> None:
    """One line that is never wrapped, so that the path can be copied."""
    Console(highlight=False, markup=False).print(f"{what}: {path}", soft_wrap=True)
