"""The cosine of N pairs of D-vectors under H heads, a program for several of the N * H pairs:

    score[n, h] = <image[n, h], text[n, h]> / (||image[n, h]|| ||text[n, h]||)

    grad_image  = grad * (text / ||text|| - score * image / ||image||) / ||image||, and with the two exchanged

image, text (N, H, D) in float32, bfloat16 or float16, each its own; score and all sums float32. A pair with a vector
of norm ZERO_NORM or less scores 0 and has zero gradients.

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
from cmai_fast.ops.reference import ZERO_NORM

_CARRIED = (torch.float32, torch.bfloat16, torch.float16)

# With so many elements a thread of four warps reads 16 of each vector, in 128 bits at a time also where they are half.
_ELEMENTS = 2048


@triton.jit
def _pair_sums(image_ptr, text_ptr, offset, inside, size, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """<image, image>, <text, text> and <image, text> of the program's pairs."""
    lane = tl.arange(0, BLOCK_D)
    image_square = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    text_square = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, size, BLOCK_D):
        at = offset[:, None] + start + lane[None, :]
        mask = inside[:, None] & (start + lane < size)[None, :]
        image = tl.load(image_ptr + at, mask=mask, other=0.0).to(tl.float32)
        text = tl.load(text_ptr + at, mask=mask, other=0.0).to(tl.float32)
        image_square += image * image
        text_square += text * text
        product += image * text
    return tl.sum(image_square, 1), tl.sum(text_square, 1), tl.sum(product, 1)


@triton.jit
def _cosine(
    image_ptr, text_ptr, offset, inside, size, ZERO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The score, whether a vector of the pair counts as zero, and the norms, 1 where it does."""
    image_square, text_square, product = _pair_sums(image_ptr, text_ptr, offset, inside, size, BLOCK_P, BLOCK_D)
    image_norm, text_norm = tl.sqrt_rn(image_square), tl.sqrt_rn(text_square)
    # "<=" and not ">" negated: NaN must come through as NaN and not as a score of 0.
    zero = (image_norm <= ZERO) | (text_norm <= ZERO)
    image_norm, text_norm = tl.where(zero, 1.0, image_norm), tl.where(zero, 1.0, text_norm)
    # One norm after the other: their product leaves float32 where neither does.
    score = tl.div_rn(tl.div_rn(product, image_norm), text_norm)
    return tl.where(zero, 0.0, score), zero, image_norm, text_norm


@triton.jit
def _cosine_heads_kernel(
    image_ptr, text_ptr, score_ptr, pairs, size, ZERO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pair < pairs
    score, _, _, _ = _cosine(image_ptr, text_ptr, pair * size, inside, size, ZERO, BLOCK_P, BLOCK_D)
    # Both comparisons are false for NaN, which so stays.
    score = tl.where(score > 1.0, 1.0, tl.where(score < -1.0, -1.0, score))
    tl.store(score_ptr + pair, score, mask=inside)


@triton.jit
def _cosine_heads_backward_kernel(
    grad_ptr, image_ptr, text_ptr, grad_image_ptr, grad_text_ptr, pairs, size,
    ZERO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside, offset = pair < pairs, pair * size
    score, zero, image_norm, text_norm = _cosine(image_ptr, text_ptr, offset, inside, size, ZERO, BLOCK_P, BLOCK_D)
    grad = tl.load(grad_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    lane = tl.arange(0, BLOCK_D)
    for start in range(0, size, BLOCK_D):
        at = offset[:, None] + start + lane[None, :]
        mask = inside[:, None] & (start + lane < size)[None, :]
        image = tl.load(image_ptr + at, mask=mask, other=0.0).to(tl.float32)
        text = tl.load(text_ptr + at, mask=mask, other=0.0).to(tl.float32)
        image_unit = tl.where(zero[:, None], 0.0, tl.div_rn(image, image_norm[:, None]))
        text_unit = tl.where(zero[:, None], 0.0, tl.div_rn(text, text_norm[:, None]))
        grad_image = tl.div_rn(grad[:, None] * (text_unit - score[:, None] * image_unit), image_norm[:, None])
        grad_text = tl.div_rn(grad[:, None] * (image_unit - score[:, None] * text_unit), text_norm[:, None])
        tl.store(grad_image_ptr + at, grad_image.to(grad_image_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_text_ptr + at, grad_text.to(grad_text_ptr.dtype.element_ty), mask=mask)


def _blocks(size: int) -> tuple[int, int]:
    """How many pairs a program takes, and how many elements of each at a time."""
    block_d = min(1024, triton.next_power_of_2(size))
    return min(64, _ELEMENTS // block_d), block_d


def _carries(image: Tensor, text: Tensor) -> bool:
    carried = image.dtype in _CARRIED and text.dtype in _CARRIED
    return carried and image.numel() > 0 and triton_kernels.runs_on(image)


def _plan_cosine_heads(image: Tensor, text: Tensor) -> Callable[..., Tensor] | None:
    if not _carries(image, text):
        return None
    rows, heads, size = image.shape
    block_p, block_d = _blocks(size)
    grid = (triton.cdiv(rows * heads, block_p),)

    def kernel(image: Tensor, text: Tensor) -> Tensor:
        score = torch.empty(rows, heads, dtype=torch.float32, device=image.device)
        with torch.cuda.device_of(image):
            _cosine_heads_kernel[grid](
                image.contiguous(), text.contiguous(), score, rows * heads, size, ZERO_NORM, block_p, block_d
            )
        return score

    return kernel


def _plan_cosine_heads_backward(
    grad: Tensor, image: Tensor, text: Tensor
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    if not _carries(image, text) or grad.dtype not in _CARRIED:
        return None
    rows, heads, size = image.shape
    block_p, block_d = _blocks(size)
    grid = (triton.cdiv(rows * heads, block_p),)

    def kernel(grad: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        # Not empty_like: it would keep the strides of an image that is not contiguous.
        grad_image, grad_text = image.new_empty(image.shape), text.new_empty(text.shape)
        with torch.cuda.device_of(image):
            _cosine_heads_backward_kernel[grid](
                grad.contiguous(), image.contiguous(), text.contiguous(), grad_image, grad_text, rows * heads, size,
                ZERO_NORM, block_p, block_d,
            )  # fmt: skip
        return grad_image, grad_text

    return kernel


KERNELS: dict[str, Callable[..., Callable[..., Any] | None]] = {
    "cosine_heads": _plan_cosine_heads,
    "cosine_heads_backward": _plan_cosine_heads_backward,
}
