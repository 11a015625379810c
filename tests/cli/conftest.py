from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cmai_fast.cli import app
from cmai_fast.evaluation import experiment


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Result]:
    """`run("attack", "--model", "x")`: the command in an empty folder, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("CMAI_FAST_TRACEBACK", "")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the command sets these two where they are not set
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


def measured(acc_clean: float = 0.98, acc_robust: float = 0.1, asr: float = 0.9) -> dict[str, Any]:
    return {"acc_clean": acc_clean, "acc_robust": acc_robust, "asr": asr, "n": 500, "attacks": {}}


@pytest.fixture
def results() -> dict[str, Any]:
    """What an experiment gives back, in short."""
    return {
        "settings": {"model": "easyvqa-llava", "data": "easyvqa", "eps": 8 / 255, "norm": "linf"},
        "versions": {},
        "seed": 0,
        "undefended": measured(),
        "immunised": measured(0.97, 0.875, 0.0975),
    }


class Recorder:
    """Stands in for an experiment: keeps how it was called, and gives back results or raises."""

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
def replace_experiment(monkeypatch) -> Callable[[str, Any], Recorder]:
    """`replace_experiment("evaluate", outcome)` puts a recorder in its place and returns it."""

    def replace(name: str, outcome: Any) -> Recorder:
        recorder = Recorder(outcome)
        monkeypatch.setattr(experiment, name, recorder)
        return recorder

    return replace
