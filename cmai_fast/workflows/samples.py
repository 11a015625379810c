"""The samples of a run: a data source asked as the task asks, with wrong answers where training needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cmai_fast.data import Sample, VQACollator
from cmai_fast.data.sources import DataSource
from cmai_fast.pipeline import Pipeline
from cmai_fast.tasks import TASKS

_POOL = 512  # answers of other samples to choose wrong ones from


def asked(source: DataSource, split: str, task: str, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """The samples of a split, each with the prompt that the task gives it.

    Raises:
        ValueError: a sample without references: nothing would be right.
    """
    samples, prompt = source.load(split, limit, seed), TASKS[task].prompt
    found = [replace(s, prompt=prompt(s)) for s in (samples[i] for i in range(len(samples)))]
    for sample in found:
        if not sample.references:
            raise ValueError(f"sample {sample.id!r} of {source.name} has no answer; expected at least one reference")
    return found


class TrainingSamples(Sequence[Sample]):
    """The training split, each sample with choices: its own, else its answer and those of other samples.

    The contrastive loss draws wrong answers from them.
    """

    def __init__(self, source: DataSource, task: str) -> None:
        self.task, self.samples = TASKS[task], source.load("train")
        self._others: list[Sample] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        sample = self.samples[index]
        sample = replace(sample, prompt=self.task.prompt(sample))
        if sample.choices:
            return sample
        return replace(sample, choices=(sample.answer, *self.task.wrong_answers(sample, self._answers())))

    def _answers(self) -> list[Sample]:
        """One sample per answer, without its images; the first `_POOL`."""
        if self._others is None:
            found: dict[str, Sample] = {}
            for sample in (self.samples[i] for i in range(len(self.samples))):
                if sample.references:
                    found.setdefault(sample.answer, replace(sample, images=()))
                if len(found) == _POOL:
                    break
            self._others = list(found.values())
        return self._others


def training_batches(
    pipeline: Pipeline, samples: Sequence[Sample], batch_size: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Endless training batches with wrong answers, in an order that depends on `seed` alone."""
    collate = VQACollator(pipeline.processor, negatives=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(samples), (batch_size,), generator=generator).tolist()
        yield pipeline.on_device(collate([samples[i] for i in rows]))
