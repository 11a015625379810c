"""How the step kernels divide a batch, and their common loads and stores.

An image tensor is contiguous, (rows, patches, channels, inner) in memory. A program takes a span of one segment, and a
segment is never left: it is a run of one channel where runs are long, so that mean and std are two scalars of a
program; and a whole row where runs are short (flattened patches, channels last) or channels do not matter. A row that
is a multiple of 16 elements so is read and written with 128 bits at a time, four float32 a thread; another row, whose
start is not aligned, an element at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmai_fast.ops import triton_kernels

# Four elements a thread for every dtype: with more for the narrow ones, values would change threads through shared
# memory between a load of one width and a store of another.
BLOCK, WARPS = 1024, 8

# The span of kernels that reduce, or that read what was reduced: it keeps partial sums few.
SPAN = 4 * BLOCK

_CARRIED = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def place(segment_size, segments, blocks, SPAN: tl.constexpr):
    """The program's row; its segment in the batch; where in the segment it starts; that place in the batch."""
    program = tl.program_id(0)
    segment = program // blocks
    start = (program % blocks).to(tl.int64) * SPAN
    return (segment // segments).to(tl.int64), segment, start, segment.to(tl.int64) * segment_size + start


@triton.jit
def channel_of(segment, start, lane, CHANNELS: tl.constexpr, INNER: tl.constexpr):
    """The channel of the segment, a scalar, or with runs of INNER elements that of each element from `start` on."""
    if INNER == 0:
        channel = segment % CHANNELS
    else:
        # What is left of `start` is small, and a division of 32 bits by a constant is a product.
        channel = ((start % (CHANNELS * INNER)).to(tl.int32) + lane) // INNER % CHANNELS
    return channel


@triton.jit
def load_pixels(clean_ptr, at, inside):
    """float32; 8-bit pixels in the [0, 1] range."""
    pixels = tl.load(clean_ptr + at, mask=inside, other=0)
    if clean_ptr.dtype.element_ty == tl.uint8:
        pixels = tl.div_rn(pixels.to(tl.float32), 255.0)
    return pixels


@triton.jit
def count_nonfinite(nonfinite_ptr, grad, row):
    """Adds the number of NaN and infinite elements, of which those outside of the mask are none."""
    if nonfinite_ptr is not None:
        bad = tl.sum((~(tl.abs(grad) < float("inf"))).to(tl.int32))
        tl.atomic_add(nonfinite_ptr + row, bad.to(tl.int64), mask=bad > 0)


@triton.jit
def load_gradient(grad_ptr, at, inside, nonfinite_ptr, row):
    """The gradient as float32, after counting its non-finite elements."""
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    count_nonfinite(nonfinite_ptr, grad, row)
    return grad


@triton.jit
def in_pixels(grad, std_ptr, channel):
    """The gradient in pixels; NaN counts as 0."""
    grad = tl.where(grad == grad, grad, 0.0)
    if std_ptr is not None:
        grad = tl.div_rn(grad, tl.load(std_ptr + channel))
    return grad


@triton.jit
def store_model_input(model_input_ptr, at, inside, image, mean_ptr, std_ptr, channel):
    """(image - mean) / std, in the dtype of the model's input; nothing if there is none."""
    if model_input_ptr is not None:
        if mean_ptr is not None:
            image = tl.div_rn(image - tl.load(mean_ptr + channel), tl.load(std_ptr + channel))
        tl.store(model_input_ptr + at, image.to(model_input_ptr.dtype.element_ty), mask=inside)


@triton.jit
def clamp(image, low, high):
    # Both comparisons are false for NaN, which therefore stays NaN instead of becoming a bound.
    image = tl.where(image < low, low, image)
    return tl.where(image > high, high, image)


@triton.jit
def sign(grad):
    return tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, 0.0))


@triton.jit
def store_sum(sums_ptr, row, partials, value, KIND: tl.constexpr, KINDS: tl.constexpr):
    """The program's part of the row's sum number KIND; sums is (rows, KINDS, partials) float64."""
    tl.store(sums_ptr + (row * KINDS + KIND) * partials + tl.program_id(0) % partials, tl.sum(value))


@triton.jit
def row_sum(sums_ptr, row, partials, KIND: tl.constexpr, KINDS: tl.constexpr):
    """The row's sum, always in the same order: a row's result does not depend on its batch, nor on what runs first."""
    lane = tl.arange(0, 256)
    total = tl.zeros([256], tl.float64)
    for first in range(0, partials, 256):
        at = (row * KINDS + KIND) * partials + first + lane
        total += tl.load(sums_ptr + at, mask=first + lane < partials, other=0.0)
    return tl.sum(total)


@triton.jit
def shrink_to(squared, eps):
    """The factor that takes a vector of this squared norm (float64) onto the ball: 1 inside."""
    norm = tl.sqrt(tl.maximum(squared, 0.0))
    outside = norm > eps
    return tl.where(outside, eps / tl.where(outside, norm, 1.0), 1.0).to(tl.float32)


@triton.jit
def plan_move(sums_ptr, row, partials, eps, step):
    """How far (float64) an L2 step goes along the gradient, and the factor back onto the ball, from the sums over the
    row of g * g, d * g and d * d, where d = adv - clean.

    They are float64 because gradients of a confident model are often below 1e-23, whose squares are zero in float32.
    """
    gg, dg = row_sum(sums_ptr, row, partials, 0, 3), row_sum(sums_ptr, row, partials, 1, 3)
    dd = row_sum(sums_ptr, row, partials, 2, 3)
    moves = (gg > 0) & (gg < float("inf"))
    along = tl.where(moves, step / tl.sqrt(tl.where(moves, gg, 1.0)), 0.0)
    # dg may be NaN where the row does not move.
    squared = tl.where(moves, dd + 2 * along * dg + along * along * gg, dd)
    return along, shrink_to(squared, eps)


@triton.jit
def along_gradient(grad, along):
    # An infinite gradient does not move its row, and 0 * inf is NaN.
    return tl.where(along == 0, 0.0, grad.to(tl.float64) * along).to(tl.float32)


@triton.jit
def onto_ball(image, clean, shrink):
    # A row inside the ball is not rounded through `clean`.
    return tl.where(shrink < 1, clean + shrink * (image - clean), image)


@triton.jit
def ascend_l2(image, grad, clean, along, shrink, lower, upper):
    """One projected L2 step from `image`."""
    return clamp(onto_ball(image + along_gradient(grad, along), clean, shrink), lower, upper)


@dataclass(frozen=True)
class Walk:
    """The arguments that all step kernels end in. `options` are the compiler's."""

    grid: tuple[int]
    partials: int  # programs per row
    sizes: tuple[int, ...]  # segment_size, segments, blocks, CHANNELS, INNER, SPAN, BLOCK
    options: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    rows: int
    segments: int  # per row
    segment_size: int
    channels: int
    inner: int  # 0 where a segment is a run of one channel

    def walk(self, span: int) -> Walk:
        blocks = -(-self.segment_size // span)
        partials = self.segments * blocks
        sizes = (self.segment_size, self.segments, blocks, self.channels, self.inner, span, BLOCK)
        # Without fused products the bits are those of the reference; the kernels wait for memory anyway.
        return Walk((self.rows * partials,), partials, sizes, {"num_warps": WARPS, "enable_fp_fusion": False})


def layout_of(
    adv: Tensor,
    clean: Tensor,
    *,
    grad: Tensor | None = None,
    model_input: Tensor | None = None,
    others: tuple[Tensor | None, ...] = (),
    mean: Tensor | None = None,
    patches: int = 1,
) -> Layout | None:
    """How to walk these images, or None where the kernels do not carry them. `others` need only be contiguous."""
    grad, model_input = adv if grad is None else grad, adv if model_input is None else model_input
    images = [adv, clean, grad, model_input, *(image for image in others if image is not None)]
    if (
        adv.numel() == 0
        or adv.dtype != torch.float32
        or grad.dtype not in _CARRIED
        or model_input.dtype not in _CARRIED
        or not all(image.is_contiguous() for image in images)
        or not triton_kernels.runs_on(adv)
    ):
        return None
    rows, row = adv.shape[0], math.prod(adv.shape[1:])
    if mean is None:
        return Layout(rows, 1, row, 1, 0)
    channels, runs = mean.shape[0], mean.shape[0] * patches
    inner = row // runs
    return Layout(rows, runs, inner, channels, 0) if inner >= SPAN else Layout(rows, 1, row, channels, inner)
