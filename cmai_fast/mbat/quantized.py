"""Training with a quantised language model: it is frozen in 4 or 8 bits, and the vision side learns.

The language model takes most of the memory, and for image perturbations it only has to propagate gradients. These reach
the pixels through the quantised weights, for which no gradient is computed. Adapters (`cmai_fast.mbat.adapters`) can
learn too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from cmai_fast.bridge import ModelBridge, bridge_of
from cmai_fast.mbat.adapters import has_adapters


def quantized_language_model(
    folder: str | Path, bits: int = 4, compute_dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig:
    """The `quantization_config` for `from_pretrained` that quantises only the language model.

    By default, bitsandbytes quantises every linear layer except the output layer, and so the vision tower, whose
    weights then could not be trained.

    Args:
        folder: a model of the hub or a local folder, as for `from_pretrained`; only its config is read.
        bits: 4 (NF4 with nested scales, Dettmers et al. 2023) or 8 (LLM.int8 with threshold 0, without outliers:
            splitting them off would make a row's result depend on the other rows of its batch).
        compute_dtype: of the products in 4 bits.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: `bits` is neither 4 nor 8, or the model cannot be bridged.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; expected 4 or 8")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("quantised training needs bitsandbytes; pip install 'cmai-fast[quantized]'")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    settings: dict[str, Any] = {"llm_int8_skip_modules": _outside_language_model(model)}
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, **settings)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        **settings,
    )


def _outside_language_model(model: Any) -> list[str]:
    """The names of the largest modules that contain no part of the language model."""
    language = bridge_of(model, empty=True).text_model

    def outside(name: str, module: nn.Module) -> Iterator[str]:
        if module is language:
            return
        if any(part is language for part in module.modules()):
            for child, part in module.named_children():
                yield from outside(f"{name}.{child}".lstrip("."), part)
        else:
            yield name

    return list(outside("", model))


def is_quantized(model: Any) -> bool:
    """Whether the model was loaded with a `quantization_config`."""
    return bool(getattr(model, "is_quantized", False))


def check_vision_side(bridge: ModelBridge) -> None:
    """Raises ValueError if a layer of the vision side is quantised: only its norms and biases would learn."""
    for part in bridge.vision_side:
        for name, p in part.named_parameters():
            if not p.is_floating_point():
                raise ValueError(
                    f"the weight {name} of {type(part).__name__} is quantised ({p.dtype}), so the vision side cannot "
                    "be trained; load the model with quantization_config=quantized_language_model(...)"
                )


def freeze_language_model(bridge: ModelBridge, adapters: set[nn.Parameter]) -> None:
    """Freezes its parameters, including norms and embeddings, and those of the output layer; `adapters` learn."""
    parts = (bridge.text_model, bridge.model.get_output_embeddings())
    for p in {p for part in parts if part is not None for p in part.parameters()} - adapters:
        p.requires_grad_(False)


@contextmanager
def trainable_in_part(model: Any) -> Iterator[None]:
    """Inside, `Trainer` accepts a quantised model without adapters, whose quantised part is frozen."""
    if not is_quantized(model) or has_adapters(model):
        yield
        return
    model._hf_peft_config_loaded = True  # checked by `validate_quantization_for_training`
    try:
        yield
    finally:
        model._hf_peft_config_loaded = False
