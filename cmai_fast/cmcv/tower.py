"""A vision side beside a model: what the verifier sees with, so that an attack on the model does not own it."""

from __future__ import annotations

import copy
from typing import Any

from cmai_fast.bridge import ModelBridge, bridge_of
from cmai_fast.cmcv.encoder import Encoder, EncoderBridge


def beside(bridge: ModelBridge) -> Any:
    """A model with a copy of this one's vision side, frozen; all other modules are the model's own, not copied."""
    model = bridge.model
    seen = {id(part) for side in bridge.vision_side for part in side.modules()}
    around = {id(part) for part in model.modules() if seen & {id(inner) for inner in part.modules()}} - seen
    shared: dict[int, Any] = {id(part): part for part in model.modules() if id(part) not in around | seen}
    twin = copy.deepcopy(model, {**shared, id(model.config): model.config})
    for p in bridge_of(twin).vision_parameters:
        p.requires_grad_(False)
        p.grad = None
    return twin


def seen_with(bridge: ModelBridge, tower: Any) -> ModelBridge:
    """The bridge whose features a verifier of this model reads: the model's own, or that of its tower."""
    if tower is None:
        return bridge
    return EncoderBridge(bridge, tower) if isinstance(tower, Encoder) else bridge_of(tower)
