"""Chooses the adapter of a model by the methods that it has, not by its name."""

from __future__ import annotations

import inspect

from torch import nn

from cmai_fast.bridge.adapters import without_wrapper
from cmai_fast.bridge.bridge import Bridge
from cmai_fast.bridge.dual import DualBridge
from cmai_fast.bridge.encoder_decoder import EncoderDecoderBridge
from cmai_fast.bridge.protocol import ModelBridge
from cmai_fast.versions import TESTED

# Those that every test of bridges covers; other models with the same methods work too.
SUPPORTED = (
    "LLaVA",
    "LLaVA-NeXT",
    "LLaVA-OneVision",
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "SmolVLM",
    "Idefics3",
    "PaliGemma",
    "Gemma 3",
    "InternVL",
    "BLIP-2",
    "InstructBLIP",
    "ViT-GPT2",
    "CLIP",
    "SigLIP",
    "photo-dual-encoder",
)


def bridge_of(model: nn.Module, *, empty: bool = False) -> ModelBridge:
    """The three-part view of any model of `transformers` that has one, in a `PeftModel` or not.

    Raises:
        ValueError: it has none (the message names the missing methods and the supported families), it has an adapter
            that changes the whole model's forward pass, such as prompt tuning, or it has weights on the meta device.
            The last is allowed with `empty`, for callers that only read names and widths.
    """
    bare = without_wrapper(model)
    try:
        bridge = _adapter(bare)
    except ValueError as error:
        raise ValueError(
            f"{error}. Supported by transformers {' to '.join(TESTED['transformers'])} are the families "
            f"{', '.join(SUPPORTED)}, and other models that offer the same (docs/families.md)"
        ) from error
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta and not empty:
        raise ValueError(
            f"{len(meta)} parameters of {type(model).__name__} are on the meta device ({meta[0]}), so they have no "
            "values; load the model with from_pretrained onto a real device (no device_map that offloads to disk)"
        )
    return bridge


def _adapter(model: nn.Module) -> ModelBridge:
    forward = inspect.signature(model.forward).parameters
    if "mm_encoder_outputs" not in forward:
        if hasattr(model, "get_text_features") and hasattr(model, "logit_scale"):
            return DualBridge(model)
        if {"pixel_values", "encoder_outputs"} <= set(forward) and hasattr(model, "decoder"):
            return EncoderDecoderBridge(model)
    return Bridge(model)
