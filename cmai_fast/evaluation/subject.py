"""A model under evaluation with all that belongs to it, from a bundled name, a folder, a run or a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cmai_fast.attacks import Objective
from cmai_fast.bridge import Bridge, bridge_of, frozen
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import VQACollator
from cmai_fast.threat import PixelSpace

Sample = dict[str, Any]


@dataclass
class Subject:
    """Model, processor, and heads with their threshold if there are any."""

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
        self.space = PixelSpace.from_processor(self.processor)
        self.collate = VQACollator(self.processor, max_length=self.bridge.context)

    @classmethod
    def load(cls, name: str) -> Subject:
        """Loads safetensors weights only; heads come from `cmcv/` in the model's folder or beside it.

        Raises:
            ValueError: an unknown name, or weights that are incomplete, damaged or not safetensors.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from cmai_fast.models import resolve

        where = str(resolve(name))
        try:
            model, report = AutoModelForImageTextToText.from_pretrained(
                where, use_safetensors=True, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(where)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"cannot load the model {name!r}: {error}") from error
        if report["missing_keys"]:  # which would be random numbers
            raise ValueError(f"cannot load the model {name!r}: it lacks the weights {sorted(report['missing_keys'])}")
        model.eval()
        for folder in (Path(where) / "cmcv", Path(where).parent / "cmcv"):
            if folder.is_dir():
                return cls(name, model, processor, *ConsistencyHeads.from_pretrained(folder))
        return cls(name, model, processor)

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
        objective = self.objective(
            self.collate([{**s, "answer": a} for s, a in zip(samples, answers, strict=True)])
        )
        objective.heads = self.heads
        with frozen(self.model, self.heads), torch.no_grad():
            return objective.score(objective.encode(self.space.to_model(objective.join(images)))), answers
