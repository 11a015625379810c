"""4-bit layers in the form that has a gradient.

On processors with AVX512-BF16, bitsandbytes packs a layer's weights anew at its first forward pass in evaluation mode
whose input needs no gradient, and multiplies by the packed form from then on: in bfloat16 and without a gradient rule.
An attack after such a pass would differentiate a constant, with no error. Unpacking leaves the scales of the weights
rounded to bfloat16, as packing made them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_FLAG = "support_avx512bf16_for_cpu"


def unpack(model: nn.Module) -> None:
    """From now on no 4-bit layer of `model` is packed or becomes so."""
    for layer in _packable(model):
        setattr(layer, _FLAG, False)
        _unpack(layer)


def _packable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(m, _FLAG, False)]


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, no 4-bit layer of `model` is packed or becomes so; on leaving, bitsandbytes may pack them again."""
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
