"""Which of the three adapters a model needs, by what it offers and not by its name."""

from __future__ import annotations

import inspect

from torch import nn

from cmai_fast.bridge.adapters import without_wrapper
from cmai_fast.bridge.bridge import Bridge
from cmai_fast.bridge.dual import DualBridge
from cmai_fast.bridge.encoder_decoder import EncoderDecoderBridge


def bridge_of(model: nn.Module, *, empty: bool = False) -> Bridge:
    """The three-part view of any model of `transformers` that has one, in a `PeftModel` or not.

    Raises:
        ValueError: it has none, and the message names the missing pieces; or an adapter that changes the whole model's
            forward pass, such as prompt tuning; or weights on the meta device, unless `empty`: a caller who reads names
            and widths alone needs no values.
    """
    bridge = _adapter(without_wrapper(model))
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta and not empty:
        raise ValueError(
            f"{len(meta)} parameters of {type(model).__name__} are on the meta device ({meta[0]}), so they have no "
            "values; load the model with from_pretrained onto a real device (no device_map that offloads to disk)"
        )
    return bridge


def _adapter(model: nn.Module) -> Bridge:
    forward = inspect.signature(model.forward).parameters
    if "mm_encoder_outputs" not in forward:
        if hasattr(model, "get_text_features") and hasattr(model, "logit_scale"):
            return DualBridge(model)
        if {"pixel_values", "encoder_outputs"} <= set(forward) and hasattr(model, "decoder"):
            return EncoderDecoderBridge(model)
    return Bridge(model)
