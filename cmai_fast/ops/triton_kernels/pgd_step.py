"""The PGD steps on a batch of images, (rows, patches, channels, inner) in memory:

    L_inf:  adv = clamp(clamp(adv + step * sign(grad), clean - eps, clean + eps), lower, upper)
    L2:     g = grad / std;  delta = adv + step * g / ||g|| - clean
            adv = clamp(clean + delta * min(1, eps / ||delta||), lower, upper)

and model_input = (adv - mean) / std in the same pass. The L_inf step is one elementwise pass; the L2 step is a pass
that sums g * g, d * g and d * d over each row, with d = adv - clean, and one elementwise pass. With momentum two passes
come before, and the step follows the velocity (see `velocity.py`).

`reference.py` defines the right result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmai_fast.ops.cpu import small
from cmai_fast.ops.signatures import PgdStep
from cmai_fast.ops.triton_kernels import blocks
from cmai_fast.ops.triton_kernels.blocks import BLOCK, SPAN, Layout, layout_of
from cmai_fast.ops.triton_kernels.velocity import update_velocity


@triton.jit
def _pgd_linf_step_kernel(
    adv_ptr, grad_ptr, clean_ptr, eps_ptr, step_ptr, active_ptr, model_input_ptr, nonfinite_ptr, mean_ptr, std_ptr,
    lower, upper,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    eps, step = tl.load(eps_ptr + row), tl.load(step_ptr + row)
    lane = tl.arange(0, BLOCK)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        grad = blocks.load_gradient(grad_ptr, at, inside, nonfinite_ptr, row)
        clean = blocks.load_pixels(clean_ptr, at, inside)
        adv = tl.load(adv_ptr + at, mask=inside, other=0.0) + step * blocks.sign(grad)
        adv = blocks.clamp(blocks.clamp(adv, clean - eps, clean + eps), lower, upper)
        tl.store(adv_ptr + at, adv, mask=inside)
        blocks.store_model_input(model_input_ptr, at, inside, adv, mean_ptr, std_ptr, channel)


@triton.jit
def _pgd_l2_sums_kernel(
    adv_ptr, grad_ptr, clean_ptr, active_ptr, nonfinite_ptr, grad_std_ptr, sums_ptr, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], tl.float64)
    dg = tl.zeros([BLOCK], tl.float64)
    dd = tl.zeros([BLOCK], tl.float64)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        grad = blocks.load_gradient(grad_ptr, at, inside, nonfinite_ptr, row)
        g = blocks.in_pixels(grad, grad_std_ptr, channel).to(tl.float64)
        clean = blocks.load_pixels(clean_ptr, at, inside)
        d = (tl.load(adv_ptr + at, mask=inside, other=0.0) - clean).to(tl.float64)
        gg += g * g
        dg += d * g
        dd += d * d
    blocks.store_sum(sums_ptr, row, partials, gg, 0, 3)
    blocks.store_sum(sums_ptr, row, partials, dg, 1, 3)
    blocks.store_sum(sums_ptr, row, partials, dd, 2, 3)


@triton.jit
def _pgd_l2_step_kernel(
    adv_ptr, grad_ptr, clean_ptr, eps_ptr, step_ptr, active_ptr, model_input_ptr, mean_ptr, std_ptr, grad_std_ptr,
    sums_ptr, lower, upper, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    if active_ptr is not None:
        if not tl.load(active_ptr + row):
            return
    eps, step = tl.load(eps_ptr + row).to(tl.float64), tl.load(step_ptr + row).to(tl.float64)
    along, shrink = blocks.plan_move(sums_ptr, row, partials, eps, step)
    lane = tl.arange(0, BLOCK)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        grad = blocks.in_pixels(blocks.load_gradient(grad_ptr, at, inside, None, row), grad_std_ptr, channel)
        clean = blocks.load_pixels(clean_ptr, at, inside)
        adv = tl.load(adv_ptr + at, mask=inside, other=0.0)
        adv = blocks.ascend_l2(adv, grad, clean, along, shrink, lower, upper)
        tl.store(adv_ptr + at, adv, mask=inside)
        blocks.store_model_input(model_input_ptr, at, inside, adv, mean_ptr, std_ptr, channel)


def _linf_step(
    layout: Layout,
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    active: Tensor | None,
    model_input: Tensor | None,
    nonfinite: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    grad_std: Tensor | None,
    lower: float,
    upper: float,
) -> None:
    walk = layout.walk(BLOCK)
    _pgd_linf_step_kernel[walk.grid](
        adv, grad, clean, eps, step, active, model_input, nonfinite, mean, std, lower, upper,
        *walk.sizes, **walk.options,
    )  # fmt: skip


def _l2_step(
    layout: Layout,
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    active: Tensor | None,
    model_input: Tensor | None,
    nonfinite: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    grad_std: Tensor | None,
    lower: float,
    upper: float,
) -> None:
    walk = layout.walk(SPAN)
    sums = torch.empty(3 * walk.grid[0], dtype=torch.float64, device=adv.device)
    _pgd_l2_sums_kernel[walk.grid](
        adv, grad, clean, active, nonfinite, grad_std, sums, walk.partials, *walk.sizes, **walk.options
    )
    _pgd_l2_step_kernel[walk.grid](
        adv, grad, clean, eps, step, active, model_input, mean, std, grad_std, sums, lower, upper, walk.partials,
        *walk.sizes, **walk.options,
    )  # fmt: skip


def _planner(take_step: Callable[..., None]) -> Callable[..., Callable[..., None] | None]:
    def planner(c: PgdStep) -> Callable[..., None] | None:
        layout = layout_of(
            c.adv,
            c.clean,
            grad=c.grad,
            model_input=c.model_input,
            others=(c.velocity, c.nonfinite),
            mean=c.mean,
            patches=c.patches,
        )
        if layout is None:
            return None

        def kernel(
            adv, grad, clean, eps, step, active, model_input, velocity, decay, nonfinite, mean, std, _, lower, upper
        ):
            eps, step, mean, std = eps.float().contiguous(), step.float().contiguous(), small(mean), small(std)
            active = None if active is None else active.contiguous()
            written = [image for image in (adv, model_input, velocity, nonfinite) if image is not None]
            with torch.cuda.device_of(adv):
                grad_std = std
                if velocity is not None:
                    update_velocity(layout, velocity, grad, std, active, nonfinite, decay)
                    # It is in pixels, and the bad elements have been counted.
                    grad, grad_std, nonfinite = velocity, None, None
                take_step(
                    layout, adv, grad, clean, eps, step, active, model_input, nonfinite, mean, std, grad_std, lower,
                    upper,
                )  # fmt: skip
            # PyTorch has not seen the writes; without this a backward through the old values would be silently wrong.
            torch.autograd.graph.increment_version(written)

        return kernel

    return planner


KERNELS: dict[str, Callable[..., Callable[..., None] | None]] = {
    "pgd_linf_step_": _planner(_linf_step),
    "pgd_l2_step_": _planner(_l2_step),
}
