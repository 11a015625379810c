"""What an attack gives a model to read beside its images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmai_fast.attacks import AttackResult
from cmai_fast.attacks.words import spoken
from cmai_fast.bridge import ModelBridge
from cmai_fast.data import Sample


@dataclass
class Texts:
    """Of some samples: texts in place of their prompts, and what is added to the embeddings of a prompt's tokens.

    prompts, words: as of `AttackResult`; None: those of the samples.
    """

    prompts: list[str] | None = None
    words: list[Tensor] | None = None

    @classmethod
    def of(cls, result: AttackResult) -> Texts:
        return cls(result.prompts, result.words)

    def put(self, places: Sequence[int], other: Texts) -> Texts:
        """These with `other` at these places."""
        put = Texts(self.prompts and list(self.prompts), self.words and list(self.words))
        for k, place in enumerate(places):
            if put.prompts is not None and other.prompts is not None:
                put.prompts[place] = other.prompts[k]
            if put.words is not None and other.words is not None:
                put.words[place] = other.words[k]
        return put

    def sample(self, k: int, sample: Sample) -> Sample:
        """The `k`-th sample with its prompt."""
        return sample if self.prompts is None else replace(sample, prompt=self.prompts[k])

    def plain(self, k: int, sample: Sample) -> bool:
        """Whether the model reads what it reads of the sample itself."""
        return (self.prompts is None or self.prompts[k] == sample.prompt) and not (
            self.words is not None and bool(self.words[k].any())
        )

    def same(self, k: int, other: Texts) -> bool:
        """Whether the model reads the same of the `k`-th sample."""
        words = (self.words is None) == (other.words is None) and (
            self.words is None or other.words is None or torch.equal(self.words[k], other.words[k])
        )
        return words and (self.prompts is None or other.prompts is None or self.prompts[k] == other.prompts[k])

    def read(self, places: Sequence[int], bridge: ModelBridge) -> AbstractContextManager[None]:
        """Inside, `generate` of the samples at these places reads their perturbed embeddings."""
        return nullcontext() if self.words is None else spoken(bridge, [self.words[k] for k in places])
