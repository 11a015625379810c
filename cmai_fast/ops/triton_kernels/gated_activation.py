"""x * sigmoid(r * x) * other, elementwise, and with s = sigmoid(r * x)

    grad_x = grad * other * (s + x * r * s * (1 - s)),  grad_other = grad * x * s

x, other and grad contiguous, in float32, bfloat16 or float16, alike; inside float32.

`reference.py` defines the right result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmai_fast.ops import triton_kernels
from cmai_fast.ops.cpu import contiguous, like
from cmai_fast.ops.schema import RATES

_CARRIED = (torch.float32, torch.bfloat16, torch.float16)

# Eight elements a thread: 128 bits at a time where they are half.
BLOCK = 1024
# Without fused products the bits do not depend on what the compiler knows of the size, and so not on the batch.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _activation(x, rate):
    """Value and slope. 1 - sigmoid is not taken as a difference, of which little would be left for large x.

    The quotient is the approximate one, good to two units in the last place: the exact one takes as many instructions
    as all the rest, and arithmetic then as long as memory.
    """
    z = rate * x
    small = tl.exp(-tl.abs(z))
    high = 1.0 / (1.0 + small)  # sigmoid(|z|), and below sigmoid(-|z|)
    low = small * high
    sigmoid = tl.where(z < 0, low, high)
    return x * sigmoid, sigmoid + x * (rate * (high * low))


@triton.jit
def _gated_activation_kernel(x_ptr, other_ptr, out_ptr, rate, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value, _ = _activation(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), rate)
    if other_ptr is not None:
        value *= tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_activation_backward_kernel(
    grad_ptr, x_ptr, other_ptr, grad_x_ptr, grad_other_ptr, rate, size, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), rate)
    if other_ptr is not None:
        other = tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_other_ptr + at, (grad * value).to(grad_other_ptr.dtype.element_ty), mask=inside)
        grad *= other
    tl.store(grad_x_ptr + at, (grad * slope).to(grad_x_ptr.dtype.element_ty), mask=inside)


def _carries(x: Tensor) -> bool:
    return x.dtype in _CARRIED and x.numel() > 0 and triton_kernels.runs_on(x)


def _plan_gated_activation(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Callable[..., Tensor] | None:
    if not _carries(x):
        return None
    size, rate = x.numel(), RATES[kind]
    grid = (triton.cdiv(size, BLOCK),)

    def kernel(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Tensor:
        out = like(x)
        with torch.cuda.device_of(x):
            _gated_activation_kernel[grid](x.contiguous(), contiguous(other), out, rate, size, BLOCK, **_OPTIONS)
        return out

    return kernel


def _plan_gated_activation_backward(
    grad: Tensor, x: Tensor, other: Tensor | None, kind: str
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    if not _carries(x):
        return None
    size, rate = x.numel(), RATES[kind]
    grid = (triton.cdiv(size, BLOCK),)

    def kernel(grad: Tensor, x: Tensor, other: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
        grad_x, grad_other = like(x), x.new_empty(0) if other is None else like(x)
        with torch.cuda.device_of(x):
            _gated_activation_backward_kernel[grid](
                grad.contiguous(), x.contiguous(), contiguous(other), grad_x, grad_other, rate, size, BLOCK,
                **_OPTIONS,
            )  # fmt: skip
        return grad_x, grad_other

    return kernel


KERNELS: dict[str, Callable[..., Callable[..., Any] | None]] = {
    "gated_activation": _plan_gated_activation,
    "gated_activation_backward": _plan_gated_activation_backward,
}
