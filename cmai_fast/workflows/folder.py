"""The output folder of a run: new, unfinished or finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmai_fast.evaluation.results import read_results
from cmai_fast.evaluation.state import check_resumable, check_settings
from cmai_fast.report import write_report

RESULTS, REPORT, STATE = "results.json", "report.html", "state"


def check_folder(out: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """The results of a finished run; None if a run may start or resume in `out`. Changes nothing.

    Raises:
        ValueError: `out` is not empty, or holds a run that is still running, has other settings, or is not resumed.
    """
    if check_resumable(out / STATE, settings, resume, out):
        return None
    if not (out / RESULTS).is_file():
        check_empty(out)
        return None
    if not resume:
        raise ValueError(f"{out} holds a finished run; name another folder with --out, or delete it")
    results: dict[str, Any] = dict(read_results(out))
    check_settings(results["settings"], settings, out)
    return results


def check_empty(out: Path, option: str = "--out") -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new folder with {option}")


def report(out: Path) -> dict[str, Any]:
    """Writes the report of the results in `out`, and returns the results."""
    results = read_results(out)
    write_report(results, out / REPORT)
    return dict(results)
