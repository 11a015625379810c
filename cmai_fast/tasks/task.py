"""The protocol of a task: the prompt, the score of an answer, and the score below which a sample counts as broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar, runtime_checkable

from cmai_fast.data.sample import ASK_SHORT, Sample
from cmai_fast.registry import Registry


@runtime_checkable
class Task(Protocol):
    """One kind of question.

    Attributes:
        name: as in `--task`.
        label: its name in reports.
        metric_names: names in `metrics.METRICS` of the metrics reported over all predictions.
        broken_below: a sample with a lower score counts as broken (wrong).

    A task whose score depends on all samples, such as on the frequencies of their words, also has `over(samples)`,
    which returns the task for these samples; `task_over` calls it. One that changes more of a sample than its prompt
    has `posed(sample)`, and one whose metrics rank all texts for an image (retrieval) has `ranks = True`.
    """

    name: str
    label: str
    metric_names: tuple[str, ...]
    broken_below: float

    def prompt(self, sample: Sample) -> str:
        """The text of the question, before the chat template is applied."""
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """How right a generated text is; 0: not at all."""
        ...

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """The metrics of `metric_names`, over all predictions."""
        ...

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        """Wrong answers for this sample: from its choices, else from `others` of the same kind."""
        ...


def task_over(task: Task, samples: Sequence[Sample]) -> Task:
    """The task for these samples: with what its score needs of all of them, if it needs that."""
    over = getattr(task, "over", None)
    return task if over is None else over(samples)


def posed(task: Task, sample: Sample) -> Sample:
    """The sample as it is put to a model: with the task's prompt, or as the task's own `posed` makes it."""
    own = getattr(task, "posed", None)
    return replace(sample, prompt=task.prompt(sample)) if own is None else own(sample)


def briefly(question: str) -> str:
    """The question with LLaVA's request for a short answer, unless it ends with it, as those of lmms-eval do."""
    return question if question.rstrip().endswith(ASK_SHORT) else f"{question}\n{ASK_SHORT}"


def ranks(task: Task) -> bool:
    """Whether the task's metrics rank all texts for an image."""
    return getattr(task, "ranks", False)


TASKS: Registry[Task] = Registry("task", "cmai_fast.tasks", frozenset({"task", "choices", "perturbed"}))
C = TypeVar("C", bound=Callable[[], Task])


def task(cls: C) -> C:
    """Class decorator: registers an instance of the task under its `name`."""
    made = cls()
    TASKS.add(made.name, made)
    return cls
