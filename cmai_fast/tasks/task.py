"""The protocol of a task: the prompt, the score of an answer, and the score below which a sample counts as broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from cmai_fast.data.sample import Sample
from cmai_fast.registry import Registry


@runtime_checkable
class Task(Protocol):
    """One kind of question.

    Attributes:
        name: as in `--task`.
        label: its name in reports.
        metric_names: names in `metrics.METRICS` of the metrics reported over all predictions.
        broken_below: in [0, 1]; a sample with a lower score counts as broken (wrong).
    """

    name: str
    label: str
    metric_names: tuple[str, ...]
    broken_below: float

    def prompt(self, sample: Sample) -> str:
        """The text of the question, before the chat template is applied."""
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """How right a generated text is, in [0, 1]."""
        ...

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """The metrics of `metric_names`, over all predictions."""
        ...

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        """Wrong answers for this sample: from its choices, else from `others` of the same kind."""
        ...


TASKS: Registry[Task] = Registry("task", "cmai_fast.tasks", frozenset({"task", "choices"}))
C = TypeVar("C", bound=Callable[[], Task])


def task(cls: C) -> C:
    """Class decorator: registers an instance of the task under its `name`."""
    made = cls()
    TASKS.add(made.name, made)
    return cls
