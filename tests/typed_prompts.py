"""What users typed, for the tests of attacks on it: the fitted model's questions, and those of every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cmai_fast.attacks import Victim
from cmai_fast.attacks.prompts import Prompts
from cmai_fast.data import Sample
from cmai_fast.evaluation.surface import victim_of
from cmai_fast.pipeline import Pipeline


def victim(pipeline: Pipeline, samples: list[Sample], exact: bool = True) -> Victim:
    made = victim_of(pipeline, pipeline.collate(samples))
    made.prompts, made.exact = Prompts(pipeline, samples), exact
    return made


def losses(pipeline: Pipeline, samples: list[Sample], texts: list[str]) -> torch.Tensor:
    """L_task of each sample with this text typed, by collator and bridge: not the way of the code under test."""
    typed = [replace(s, prompt=text) for s, text in zip(samples, texts, strict=True)]
    batch = pipeline.on_device(pipeline.collate(typed))
    images, text = pipeline.bridge.inputs(batch)
    with torch.no_grad():
        features = pipeline.bridge.encode_image(batch["pixel_values"].to(pipeline.model.dtype), **images)
        return pipeline.bridge.losses(features, **text)[0]


def tokens(pipeline: Pipeline, samples: list[Sample]) -> list[list[int]]:
    """Of each prompt, one at a time and so without padding."""
    return [pipeline.collate.prompts([s])["input_ids"][0].tolist() for s in samples]


def snapshot(model: Any) -> dict[str, list]:
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }
