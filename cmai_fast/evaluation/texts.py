"""What an attack gives a model to read beside its images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cmai_fast.attacks import AttackResult
from cmai_fast.attacks.captions import Captions
from cmai_fast.attacks.prompts import Prompts
from cmai_fast.attacks.words import spoken
from cmai_fast.bridge import DualBridge
from cmai_fast.data import Sample
from cmai_fast.pipeline import Pipeline


def typed(pipeline: Pipeline, targets: Sequence[Sample], samples: Sequence[Sample]) -> Prompts | Captions:
    """What an attack on text may change: the prompts of `targets`, samples with the answer that it moves away from, or
    all captions of the samples themselves, for a dual encoder."""
    return Captions(pipeline, samples) if isinstance(pipeline.bridge, DualBridge) else Prompts(pipeline, targets)


@dataclass
class Texts:
    """Of some samples: texts in place of their prompts or captions, and what is added to the embeddings of prompts.

    prompts, captions, words: as of `AttackResult`; None: those of the samples.
    """

    prompts: list[str] | None = None
    captions: list[list[str]] | None = None
    words: list[Tensor] | None = None

    @classmethod
    def of(cls, result: AttackResult) -> Texts:
        return cls(result.prompts, result.captions, result.words)

    def put(self, places: Sequence[int], other: Texts) -> Texts:
        """These with `other` at these places."""
        found: dict[str, Any] = {}
        for name, own in vars(self).items():
            found[name] = own and list(own)
            for k, place in enumerate(places):
                if own:
                    found[name][place] = getattr(other, name)[k]
        return Texts(**found)

    def sample(self, k: int, sample: Sample) -> Sample:
        """The `k`-th sample with its prompt."""
        return sample if self.prompts is None else replace(sample, prompt=self.prompts[k])

    def plain(self, k: int, sample: Sample) -> bool:
        """Whether the model reads what it reads of the sample itself."""
        return (
            (self.prompts is None or self.prompts[k] == sample.prompt)
            and self.captions is None
            and (self.words is None or not self.words[k].any())
        )

    def same(self, k: int, other: Texts) -> bool:
        """Whether the model reads the same of the `k`-th sample."""
        pairs = [(own and own[k], other and other[k]) for own, other in zip(*map(_parts, (self, other)), strict=True)]
        return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
                   for a, b in pairs)  # fmt: skip

    def answers(
        self, places: Sequence[int], pipeline: Pipeline, samples: Sequence[Sample], images: Sequence[Tensor] | None
    ) -> list[str]:
        """The model's answers to these samples (already with their prompts) at these places, with these images; None:
        their own."""
        if self.captions is not None:
            return _nearest(pipeline, samples, images, [self.captions[k] for k in places])
        if self.words is None:
            return pipeline.generate(samples, images)
        with spoken(pipeline.bridge, [self.words[k] for k in places]):
            return pipeline.generate(samples, images)


def _parts(texts: Texts) -> list[Any]:
    return [texts.prompts, texts.captions, texts.words]


def _nearest(
    pipeline: Pipeline, samples: Sequence[Sample], images: Sequence[Tensor] | None, captions: Sequence[Sequence[str]]
) -> list[str]:
    """The text nearest to each image, where the changed captions stand in place of the sample's own: the caption itself
    as the sample has it, if one of its changed ones is nearest."""
    own = Captions(pipeline, samples)
    changed = [text for texts in captions for text in texts]
    wider = copy.copy(pipeline)
    wider.collate = type(own.collate)(pipeline.processor, [*own.gallery, *changed])
    logits = wider.similarities(samples, images) if samples else torch.empty(0, len(own.gallery))
    count, found = len(own.gallery), []
    for i, row in enumerate(logits):
        mine = torch.cat([~own.own[i], own.owner == i])
        k = int(row.masked_fill(~mine, float("-inf")).argmax())
        found.append(own.gallery[k] if k < count else own.captions[k - count])
    return found
