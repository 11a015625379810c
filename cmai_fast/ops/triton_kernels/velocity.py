"""The momentum of MI-FGSM (Dong et al. 2018, eq. 6), with the gradient g = grad / std in pixels:

    velocity = decay * velocity + g / ||g||_1

per row of (rows, patches, channels, inner): a pass that sums |g|, and one elementwise pass. A row whose gradient is
zero or has an infinite element adds nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmai_fast.ops.triton_kernels import blocks
from cmai_fast.ops.triton_kernels.blocks import SPAN, Layout


@triton.jit
def _l1_sums_kernel(
    grad_ptr, std_ptr, active_ptr, nonfinite_ptr, sums_ptr, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    lane = tl.arange(0, BLOCK)
    size = tl.zeros([BLOCK], tl.float64)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        grad = blocks.load_gradient(grad_ptr, at, inside, nonfinite_ptr, row)
        size += tl.abs(blocks.in_pixels(grad, std_ptr, channel)).to(tl.float64)
    blocks.store_sum(sums_ptr, row, partials, size, 0, 1)


@triton.jit
def _velocity_kernel(
    velocity_ptr, grad_ptr, std_ptr, active_ptr, sums_ptr, decay, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    size = blocks.row_sum(sums_ptr, row, partials, 0, 1)
    adds = (size > 0) & (size < float("inf"))
    factor = tl.where(adds, 1.0 / tl.where(adds, size, 1.0), 0.0)
    lane = tl.arange(0, BLOCK)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        grad = blocks.in_pixels(blocks.load_gradient(grad_ptr, at, inside, None, row), std_ptr, channel)
        velocity = decay * tl.load(velocity_ptr + at, mask=inside, other=0.0) + blocks.along_gradient(grad, factor)
        tl.store(velocity_ptr + at, velocity, mask=inside)


def update_velocity(
    layout: Layout,
    velocity: Tensor,
    grad: Tensor,
    std: Tensor | None,
    active: Tensor | None,
    nonfinite: Tensor | None,
    decay: float,
) -> None:
    walk = layout.walk(SPAN)
    sums = torch.empty(walk.grid, dtype=torch.float64, device=grad.device)
    _l1_sums_kernel[walk.grid](grad, std, active, nonfinite, sums, walk.partials, *walk.sizes, **walk.options)
    _velocity_kernel[walk.grid](velocity, grad, std, active, sums, decay, walk.partials, *walk.sizes, **walk.options)
