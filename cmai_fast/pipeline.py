"""A model with all that belongs to it: processor, bridge, pixel space, collator, heads, threshold, generation settings.

Training, evaluation and guard ask the same prompt, generate by the same settings and compute the same S_c, because each
has it from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from cmai_fast.bridge import BatchImages, ModelBridge, bridge_of, frozen
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import Sample, VQACollator
from cmai_fast.threat import PixelSpace


@dataclass(frozen=True)
class Generation:
    """How answers are generated: greedily, at most `max_new_tokens` long, and nothing else of the checkpoint's own
    generation config but its token ids."""

    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")

    def config(self, model: Any) -> GenerationConfig:
        """For `model.generate`: sampling, penalties, lengths and beams of the checkpoint do not count."""
        theirs = model.generation_config
        ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        return GenerationConfig(
            **{k: getattr(theirs, k, None) for k in ids},
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Pipeline:
    """A model that is asked about images.

    Raises:
        ValueError: a model that cannot be bridged or takes no questions, a processor that `VQACollator` refuses, or
            heads of another model's width.
    """

    name: str
    model: Any
    processor: Any
    heads: ConsistencyHeads | None = None
    threshold: Threshold | None = None
    generation: Generation = field(default_factory=Generation)
    bridge: ModelBridge = field(init=False)
    space: PixelSpace = field(init=False)
    collate: VQACollator = field(init=False)

    def __post_init__(self) -> None:
        self.bridge = bridge_of(self.model)
        if "input_ids" not in self.bridge.needs:
            raise ValueError(
                f"{type(self.model).__name__} takes no questions, and what is measured here are answers; attack it by "
                "Victim with batches of your own"
            )
        self.space = PixelSpace.from_processor(self.processor)
        self.collate = VQACollator(self.processor, max_length=self.bridge.context)
        if self.heads is not None:
            dims = {"image_dim": self.bridge.image_dim, "text_dim": self.bridge.text_dim}
            theirs = {name: self.heads.settings[name] for name in dims}
            if theirs != dims:
                raise ValueError(
                    f"the heads were made for {theirs}, the model has {dims}; use those trained with this model"
                )

    @classmethod
    def load(cls, name: str | Path, **how: Any) -> Pipeline:
        """By name, folder, run or hub id, as `cmai_fast.models.loading.load_model`, whose `device`, `dtype` and
        `attention` it takes; heads come from `cmcv/` in the model's folder or beside it."""
        from cmai_fast.models.loading import find_heads, load_model

        model, processor = load_model(name, **how)
        place = find_heads(name)
        if place is None:
            return cls(str(name), model, processor)
        heads, threshold = ConsistencyHeads.from_pretrained(place)
        return cls(str(name), model, processor, heads.to(model.device), threshold)

    def images(self, samples: Sequence[Sample]) -> BatchImages:
        """The images of these samples, one batch, on the model's device."""
        return BatchImages(self.bridge, self.space, self.on_device(self.collate(samples)))

    def generate(self, samples: Sequence[Sample], images: Sequence[Tensor] | None = None) -> list[str]:
        """Greedy answers, one per sample.

        Args:
            images: in place of the samples' own, one tensor in [0, 1] per sample, as `BatchImages.split` gives them.
        """
        if not samples:
            return []
        prompts = self.on_device(self.collate.prompts(samples))
        if images is not None:
            prompts = self._with(images, self._closed(samples, [""] * len(samples)), prompts)
        if "pixel_values" in prompts:
            prompts["pixel_values"] = prompts["pixel_values"].to(self.model.dtype)
        self._check_context(prompts["attention_mask"])
        with frozen(self.model), torch.no_grad():
            output = self.model.generate(**prompts, generation_config=self.generation.config(self.model))
        new = output if self.model.config.is_encoder_decoder else output[:, prompts["input_ids"].shape[1] :]
        return [a.strip() for a in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def score(
        self, samples: Sequence[Sample], answers: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> Tensor:
        """S_c (N,) of each image with its prompt and this answer; `images` as for `generate`.

        Raises:
            ValueError: there are no heads.
        """
        if self.heads is None:
            raise ValueError(f"{self.name} has no consistency heads; train them (cmai-fast calibrate)")
        batch = self._closed(samples, answers)
        if images is not None:
            batch = self._with(images, batch, batch)
        batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        image_inputs, text = self.bridge.inputs(batch)
        with frozen(self.model, self.heads), torch.no_grad():
            image = self.bridge.encode_image(batch["pixel_values"], **image_inputs)
            projected = self.heads.project_image(image, self.bridge.image_tokens(text))
            return self.heads.score(projected, self.heads.project_text(self.bridge.encode_text(**text)))

    def on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.model.device) for k, v in batch.items()}

    def _closed(self, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Tensor]:
        rows = [replace(Sample.of(s), references=(a,)) for s, a in zip(samples, answers, strict=True)]
        return self.on_device(self.collate(rows))

    def _with(
        self, images: Sequence[Tensor], batch: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`inputs` with these images in place of the batch's own."""
        own = BatchImages(self.bridge, self.space, batch)
        return {**inputs, "pixel_values": own.inputs(own.join(images))["pixel_values"]}

    def _check_context(self, mask: Tensor) -> None:
        if self.bridge.context is None:
            return
        for i, length in enumerate(mask.sum(1).tolist()):
            if length + self.generation.max_new_tokens > self.bridge.context:
                raise ValueError(
                    f"question {i} makes a prompt of {length} tokens and the answer may take "
                    f"{self.generation.max_new_tokens}; the model's context is {self.bridge.context}. Shorten the "
                    "question or set max_new_tokens lower"
                )
