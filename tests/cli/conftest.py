from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cmai_fast.cli import app


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Result]:
    """`run("attack", "--model", "x")`: the command in an empty folder, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("CMAI_FAST_TRACEBACK", "")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the command sets these where they are not set
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


def measured(name: str, role: str, acc_clean: float, acc_robust: float, asr: float) -> dict[str, Any]:
    record = {"acc_clean": acc_clean, "acc_robust": acc_robust, "asr": asr, "n": 500, "attacks": {}}
    return {"name": name, "role": role, "path": name, **record}


@pytest.fixture
def results() -> dict[str, Any]:
    """What a workflow gives back, in short."""
    return {
        "schema": 2,
        "settings": {"model": "easyvqa-llava", "data": "easyvqa", "eps": 8 / 255, "norm": "linf"},
        "versions": {},
        "seed": 0,
        "models": [
            measured("undefended", "undefended", 0.98, 0.1, 0.9),
            measured("immunised", "immunised", 0.97, 0.875, 0.0975),
        ],
    }


class Recorder:
    """Stands in for a workflow: keeps how it was called, and gives back results or raises."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    @property
    def args(self) -> tuple[Any, ...]:
        return self.calls[-1][0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.calls[-1][1]


@pytest.fixture
def replace_workflow(monkeypatch) -> Callable[[str, Any], Recorder]:
    """`replace_workflow("evaluate", outcome)` puts a recorder in its place and returns it."""

    def replace(name: str, outcome: Any) -> Recorder:
        recorder = Recorder(outcome)
        monkeypatch.setattr(import_module(f"cmai_fast.workflows.{name}"), name, recorder)
        return recorder

    return replace
