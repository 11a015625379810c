"""The guarded model as an adaptive attack knows it: which wrong answers there are, and what the guard makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmai_fast.bridge import BatchImages, frozen
from cmai_fast.data import Sample
from cmai_fast.data.sample import differing
from cmai_fast.pipeline import Pipeline

# (h_v (n, T, image_dim) of the model, how many of its tokens are no padding (n,), the images in the model's input space
# (n, ...), rows of the batch) -> (n,).
Excess = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


@dataclass
class Aim:
    """The answers that an attack wants, one per sample.

    texts: inputs of `Bridge.fuse` with these answers as labels. excess: by how much their score is above the guard's
    threshold, differentiable; the guard accepts at 0.
    """

    texts: Mapping[str, Tensor]
    excess: Excess


class Deployed:
    """A pipeline with its threshold, for the samples of one batch.

    Raises:
        ValueError: the pipeline has no score or no threshold, so there is no guard to pass.
    """

    def __init__(self, pipeline: Pipeline, samples: Sequence[Sample]) -> None:
        if not pipeline.scores or pipeline.threshold is None:
            raise ValueError(
                f"{pipeline.name} has no guard: an adaptive attack needs a score and its threshold. Calibrate it "
                "(cmai-fast calibrate), or choose another attack"
            )
        self.pipeline, self.samples, self.tau = pipeline, list(samples), pipeline.threshold.tau

    def wrong(self) -> list[list[str]]:
        """Wrong answers of each sample; those come first that the guard is nearest to accepting at the clean image."""
        found = [list(self._alternatives(s)) for s in self.samples]
        rows = [i for i, answers in enumerate(found) for _ in answers]
        scores = self.pipeline.score([self.samples[i] for i in rows], [a for answers in found for a in answers])
        scores = scores.split([len(answers) for answers in found])
        return [
            [answers[k] for k in own.argsort(descending=True).tolist()]
            for answers, own in zip(found, scores, strict=True)
        ]

    def _alternatives(self, sample: Sample) -> Sequence[str]:
        verifier = self.pipeline.verifier
        known = sample.wrong_choices
        return known or (differing(verifier.alternatives.to(sample.answer), sample.references) if verifier else ())

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, the guard has no gradients of its own parameters; restored afterwards."""
        verifier = self.pipeline.verifier
        if verifier is None:
            return frozen(self.pipeline.heads)
        return frozen(verifier.network, verifier.tower)

    def aim(self, answers: Sequence[str]) -> Aim:
        """At one wrong answer per sample."""
        pipeline = self.pipeline
        rows = [replace(s, references=(a,)) for s, a in zip(self.samples, answers, strict=True)]
        batch = pipeline.on_device(pipeline.collate(rows))
        texts = pipeline.bridge.inputs(batch)[1]
        return Aim(texts, self._of_verifier(batch, answers) if pipeline.verifier else self._of_heads(texts))

    def _of_verifier(self, batch: Mapping[str, Tensor], answers: Sequence[str]) -> Excess:
        verifier = self.pipeline.verifier
        assert verifier is not None
        images = BatchImages(verifier.bridge, self.pipeline.space, batch)
        own_tokens = verifier.bridge.image_tokens(images.batch)
        with frozen(verifier.network), torch.no_grad():
            texts = verifier.texts([s.prompt for s in self.samples], answers, [s.choices for s in self.samples])

        def excess(features: Tensor, tokens: Tensor | None, model_input: Tensor, rows: Tensor | None) -> Tensor:
            if verifier.tower is not None:
                features = images.encode(model_input, rows)
                tokens = own_tokens if own_tokens is None or rows is None else own_tokens[rows]
            return verifier.margin(features, texts.rows(rows), tokens) - self.tau

        return excess

    def _of_heads(self, texts: Mapping[str, Tensor]) -> Excess:
        heads, bridge = self.pipeline.heads, self.pipeline.bridge
        assert heads is not None
        with frozen(bridge.model, heads), torch.no_grad():
            projected = heads.project_text(bridge.encode_text(**texts))

        def excess(features: Tensor, tokens: Tensor | None, model_input: Tensor, rows: Tensor | None) -> Tensor:
            text = projected if rows is None else projected[rows]
            return heads.score(heads.project_image(features, tokens), text) - self.tau

        return excess
