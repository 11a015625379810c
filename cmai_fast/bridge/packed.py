"""Keeps 4-bit layers in the form that has a gradient.

On processors with AVX512-BF16, bitsandbytes repacks a layer's weights at its first forward pass in evaluation mode
whose input needs no gradient, and from then on multiplies by the packed form: in bfloat16 and without a gradient rule.
An attack after such a pass would differentiate a constant, without an error. After unpacking, the scales of the weights
stay rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_FLAG = "support_avx512bf16_for_cpu"


def unpack(model: nn.Module) -> None:
    """Unpacks all 4-bit layers of `model`, and keeps them unpacked."""
    for layer in _packable(model):
        setattr(layer, _FLAG, False)
        _unpack(layer)


def _packable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, _FLAG, False)]


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, all 4-bit layers of `model` are unpacked and stay so; afterwards bitsandbytes may pack them again."""
    layers = _packable(model)
    try:
        unpack(model)
        yield
    finally:
        for layer in layers:
            setattr(layer, _FLAG, True)


def _unpack(layer: Any) -> None:
    weight = layer.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        layer.quant_state = weight.quant_state
