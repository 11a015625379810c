"""The samples of a run, with the task's prompts and, for training, wrong answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmai_fast.attacks import ATTACKS
from cmai_fast.data import Sample
from cmai_fast.data.choices import ChoiceCollator
from cmai_fast.data.collators import Collator, collator_of
from cmai_fast.data.sources import DataSource, check_answers, check_images
from cmai_fast.data.statements import Told
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.tasks import TASKS, Task, posed, with_choices


def asked(source: DataSource, split: str, task: str, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """The samples of a split, each with the prompt that the task gives it.

    Raises:
        ValueError: there is no such split, or a sample has no answer or no image (there would be nothing to attack).
    """
    found = list(_Asked(source.load(split, limit, seed), TASKS[task]))
    check_answers(found)
    check_images(found)
    return found


def searched(source: DataSource, task: str, attacks: Sequence[AttackSpec], seed: int = 0) -> list[Sample]:
    """As many samples of the training split as the universal attacks among these search on; none without one.

    Raises:
        ValueError: there is no training split.
    """
    counts = [{**ATTACKS[a.name].settings, **a.settings}["samples"] for a in attacks if ATTACKS[a.name].fit is not None]
    return asked(source, "train", task, max(counts), seed) if counts else []


def training_samples(
    source: DataSource, task: str, pipeline: Pipeline | None = None, split: str = "train"
) -> Sequence[Sample]:
    """The training split, each sample with choices, from which the contrastive loss draws wrong answers: its own, else
    its answer and those of other samples. For a dual encoder the samples are unchanged."""
    samples = _Asked(source.load(split), TASKS[task])
    chooses = pipeline is not None and isinstance(pipeline.collate, ChoiceCollator)
    return samples if chooses else with_choices(samples, TASKS[task])


def training_collator(pipeline: Pipeline, seed: int, statements: Told | None = None) -> Collator:
    """The collator of training: with what is said of each picture or, without `statements`, one wrong answer per
    sample, drawn with `seed`; for a dual encoder, with the texts of the batch to choose from."""
    return collator_of(pipeline.bridge, pipeline.processor, int(statements is None), seed, statements)


class _Asked(Sequence[Sample]):
    """Samples with the task's prompts, made on access."""

    def __init__(self, samples: Sequence[Sample], task: Task) -> None:
        self.samples, self.task = samples, task

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Asked(self.samples[index], self.task)
        if index >= len(self):
            raise IndexError(index)
        return posed(self.task, self.samples[index])


def training_batches(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    batch_size: int,
    seed: int,
    statements: Told | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of `training_collator`, in an order that depends only on `seed`."""
    return endless(pipeline, samples, training_collator(pipeline, seed, statements), batch_size, seed)


def endless(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    collate: Callable[[list[Sample]], dict[str, Tensor]],
    batch_size: int,
    seed: int,
    weights: np.ndarray | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of samples drawn with replacement, with `weights` (N,) or equally often."""
    generator = torch.Generator().manual_seed(seed)
    even = torch.ones(len(samples)) if weights is None else torch.from_numpy(weights)
    while True:
        rows = torch.multinomial(even, batch_size, replacement=True, generator=generator).tolist()
        yield pipeline.on_device(collate([samples[i] for i in rows]))
