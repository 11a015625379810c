"""What a task says: the prompt, the score of an answer, and below what score a sample counts as broken."""

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
        label: what reports call it.
        metric_names: of `metrics.METRICS`, what is reported of all predictions together.
        broken_below: a sample whose score is below this counts as broken (wrong), in [0, 1].
    """

    name: str
    label: str
    metric_names: tuple[str, ...]
    broken_below: float

    def prompt(self, sample: Sample) -> str:
        """The text that the model is asked, before its chat template."""
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """How right a generated text is, in [0, 1]."""
        ...

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """The metrics of `metric_names`, of all predictions together."""
        ...

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        """Answers that are wrong for this sample: of its choices, else of `others` of the same kind."""
        ...


TASKS: Registry[Task] = Registry("task", "cmai_fast.tasks", frozenset({"task", "choices"}))
C = TypeVar("C", bound=Callable[[], Task])


def task(cls: C) -> C:
    """Class decorator: registers an instance of the task under its `name`."""
    made = cls()
    TASKS.add(made.name, made)
    return cls
