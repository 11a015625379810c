"""A model under evaluation with all that belongs to it, from a bundled name, a folder, a run or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmai_fast.attacks import Objective
from cmai_fast.bridge import Bridge, bridge_of, frozen
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import VQACollator
from cmai_fast.threat import PixelSpace

Sample = dict[str, Any]


@dataclass
class Subject:
    """Model, processor, and heads with their threshold if there are any.

    Raises:
        ValueError: a model that cannot be bridged or takes no questions, or a processor that `VQACollator` refuses.
    """

    name: str
    model: Any
    processor: Any
    heads: ConsistencyHeads | None = None
    threshold: Threshold | None = None
    bridge: Bridge = field(init=False)
    space: PixelSpace = field(init=False)
    collate: VQACollator = field(init=False)

    def __post_init__(self) -> None:
        self.bridge = bridge_of(self.model)
        if "input_ids" not in self.bridge.needs:
            raise ValueError(
                f"{type(self.model).__name__} takes no questions, and what is measured here are answers; attack it by "
                "Objective with batches of your own"
            )
        self.space = PixelSpace.from_processor(self.processor)
        self.collate = VQACollator(self.processor, max_length=self.bridge.context)

    @classmethod
    def load(
        cls, name: str, *, device: str | None = None, dtype: str | None = None, attention: str | None = None
    ) -> Subject:
        """As `cmai_fast.models.loading.load_model`; heads come from `cmcv/` in the model's folder or beside it."""
        from cmai_fast.models.loading import find_heads, load_model

        model, processor = load_model(name, device=device, dtype=dtype, attention=attention)
        place = find_heads(name)
        if place is None:
            return cls(name, model, processor)
        heads, threshold = ConsistencyHeads.from_pretrained(place)
        return cls(name, model, processor, heads.to(model.device), threshold)

    def objective(self, batch: dict[str, Tensor], *, alpha: float = 1.0, beta: float = 0.0) -> Objective:
        """Of a batch of `collate`, on the model's device."""
        batch = {k: v.to(self.model.device) for k, v in batch.items()}
        return Objective(self.bridge, self.space, batch, alpha, beta, self.heads if beta else None)

    def right(self, pixels: Tensor, objective: Objective) -> Tensor:
        """Verdict on images in [0, 1], as `objective.pixels()` gives them: (N,) bool."""
        with frozen(self.model), torch.no_grad():
            return objective(self.space.to_model(pixels)).right

    def answers(self, images: Sequence[Tensor], samples: Sequence[Sample], max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to images in [0, 1], one a sample, as `Objective.split` gives them."""
        objective, prompts = self.objective(self.collate(samples)), self.collate.prompts(samples)
        inputs = {k: v.to(self.model.device) for k, v in prompts.items()}
        pixel_values = objective.inputs(objective.join(images))["pixel_values"].to(self.model.dtype)
        with frozen(self.model), torch.no_grad():
            output = self.model.generate(
                **{**inputs, "pixel_values": pixel_values}, max_new_tokens=max_new_tokens, do_sample=False
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [a.strip() for a in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def own_scores(self, images: Sequence[Tensor], samples: Sequence[Sample]) -> tuple[Tensor, list[str]]:
        """S_c (N,) of images, as for `answers`, with the answers that the model itself gives, and those answers."""
        answers = self.answers(images, samples)
        objective = self.objective(self.collate([{**s, "answer": a} for s, a in zip(samples, answers, strict=True)]))
        objective.heads = self.heads
        with frozen(self.model, self.heads), torch.no_grad():
            return objective.score(objective.encode(self.space.to_model(objective.join(images)))), answers
