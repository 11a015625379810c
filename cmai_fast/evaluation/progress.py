"""One progress line for a whole workflow: the stage, its progress, and the total time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Overall:
    """The progress of a workflow.

    Args:
        stages: the stages in order, with their expected cost in any common unit.
        show: False prints nothing.
    """

    def __init__(self, stages: Mapping[str, float], show: bool = True, console: Console | None = None) -> None:
        self.stages = dict(stages)
        self._stage, self._total, self._share = "", 1, 0.0
        self._mine, self._began = 0.0, time.monotonic()  # cost of this process's work, and its start time
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}"),
            disable=not show, console=console or Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=sum(self.stages.values()) or 1.0, left="", note="")

    def __enter__(self) -> Overall:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Begins a stage of `total` steps, of which an earlier process did `done`; all stages before it are complete.

        An unplanned stage does not move the bar.
        """
        self._stage, self._total = stage, total
        self._share = done / total if total else 1.0
        self._show(None)

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        share = min(1.0, self._share + steps / max(self._total, 1))
        self._mine += self.stages.get(self._stage, 0.0) * (share - self._share)
        self._share = share
        self._show(note)

    @property
    def completed(self) -> float:
        """Cost of the completed work, including that of earlier processes."""
        if self._stage not in self.stages:
            return 0.0
        names = list(self.stages)
        return sum(self.stages[n] for n in names[: names.index(self._stage)]) + self.stages[self._stage] * self._share

    def seconds_left(self) -> float | None:
        """Estimated from the pace of this process; None before anything is done."""
        if not self._mine:
            return None
        return (time.monotonic() - self._began) * (sum(self.stages.values()) - self.completed) / self._mine

    def _show(self, note: str | None) -> None:
        planned = self._stage in self.stages
        where = f"stage {list(self.stages).index(self._stage) + 1} of {len(self.stages)}: " if planned else ""
        seconds = self.seconds_left()
        fields: dict[str, Any] = {} if note is None else {"note": note}
        fields["left"] = "" if seconds is None else f"about {_clock(seconds)} left"
        if planned:
            self._bar.update(self._task, completed=self.completed)
        self._bar.update(self._task, description=where + self._stage, **fields)


class Silent(Overall):
    """For callers that show nothing."""

    def __init__(self) -> None:
        super().__init__({}, show=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class TrainingProgress(TrainerCallback):
    """Reports training to `Overall`, in place of Trainer's own bar, which prints every log as a raw dict."""

    def __init__(self, overall: Overall, stage: str = "training") -> None:
        self.overall, self.stage = overall, stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.overall.start(self.stage, state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.overall.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = [f"{k.removeprefix('loss_')} {v:.3f}" for k, v in (logs or {}).items() if k.startswith("loss_")]
        if parts:
            self.overall.advance(0, "loss: " + ", ".join(parts))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.overall.advance(0, "")
