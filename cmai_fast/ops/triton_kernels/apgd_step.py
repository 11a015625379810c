"""One iteration of Auto-PGD (Croce and Hein 2020, algorithm 1), on images (rows, patches, channels, inner) in memory:

    top_adv, top_grad = adv, grad            in rows that improved
    adv, g            = top_adv, top_grad    in rows that restart (after the line above), else adv, grad
    z        = P(adv + step * direction(g))
    previous = P(adv + momentum * (z - adv) + carry * (adv - previous)),  carry = 1 - momentum

where P projects onto the ball and the box. L_inf, with sign(g): one pass. L2, with the unit vector along g / std: three
passes. The first stores the best point and sums the norms for the step; the second makes the new point before its last
projection, and sums its distance from clean; the third projects it, and writes model_input = (previous - mean) / std.

`reference.py` defines the right result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmai_fast.ops.cpu import small
from cmai_fast.ops.signatures import ApgdStep
from cmai_fast.ops.triton_kernels import blocks
from cmai_fast.ops.triton_kernels.blocks import BLOCK, SPAN, Layout, layout_of


@triton.jit
def _keep_books(adv_ptr, grad_ptr, top_adv_ptr, top_grad_ptr, nonfinite_ptr, improved, restart, row, at, inside):
    """Writes adv, top_adv and top_grad; the point and the gradient that the step starts from."""
    adv = tl.load(adv_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    blocks.count_nonfinite(nonfinite_ptr, grad.to(tl.float32), row)
    tl.store(top_adv_ptr + at, adv, mask=inside & improved)
    tl.store(top_grad_ptr + at, grad, mask=inside & improved)
    # A row that both improved and restarts has its best point here already.
    back = restart & ~improved
    top_adv = tl.load(top_adv_ptr + at, mask=inside & back, other=0.0)
    top_grad = tl.load(top_grad_ptr + at, mask=inside & back, other=0.0)
    tl.store(adv_ptr + at, top_adv, mask=inside & back)
    return tl.where(back, top_adv, adv), tl.where(back, top_grad, grad).to(tl.float32)


@triton.jit
def _apgd_linf_step_kernel(
    adv_ptr, previous_ptr, grad_ptr, top_adv_ptr, top_grad_ptr, clean_ptr, eps_ptr, step_ptr, improved_ptr,
    restart_ptr, model_input_ptr, nonfinite_ptr, mean_ptr, std_ptr, momentum, carry, lower, upper,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    eps, step = tl.load(eps_ptr + row), tl.load(step_ptr + row)
    improved, restart = tl.load(improved_ptr + row), tl.load(restart_ptr + row)
    lane = tl.arange(0, BLOCK)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        adv, grad = _keep_books(
            adv_ptr, grad_ptr, top_adv_ptr, top_grad_ptr, nonfinite_ptr, improved, restart, row, at, inside
        )
        clean = blocks.load_pixels(clean_ptr, at, inside)
        previous = tl.load(previous_ptr + at, mask=inside, other=0.0)
        low, high = clean - eps, clean + eps
        stepped = blocks.clamp(blocks.clamp(adv + step * blocks.sign(grad), low, high), lower, upper)
        mixed = adv + momentum * (stepped - adv) + carry * (adv - previous)
        new = blocks.clamp(blocks.clamp(mixed, low, high), lower, upper)
        tl.store(previous_ptr + at, new, mask=inside)
        blocks.store_model_input(model_input_ptr, at, inside, new, mean_ptr, std_ptr, channel)


@triton.jit
def _apgd_l2_sums_kernel(
    adv_ptr, grad_ptr, top_adv_ptr, top_grad_ptr, clean_ptr, improved_ptr, restart_ptr, nonfinite_ptr, std_ptr,
    sums_ptr, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    improved, restart = tl.load(improved_ptr + row), tl.load(restart_ptr + row)
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], tl.float64)
    dg = tl.zeros([BLOCK], tl.float64)
    dd = tl.zeros([BLOCK], tl.float64)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        adv, grad = _keep_books(
            adv_ptr, grad_ptr, top_adv_ptr, top_grad_ptr, nonfinite_ptr, improved, restart, row, at, inside
        )
        g = blocks.in_pixels(grad, std_ptr, channel).to(tl.float64)
        d = (adv - blocks.load_pixels(clean_ptr, at, inside)).to(tl.float64)
        gg += g * g
        dg += d * g
        dd += d * d
    blocks.store_sum(sums_ptr, row, partials, gg, 0, 3)
    blocks.store_sum(sums_ptr, row, partials, dg, 1, 3)
    blocks.store_sum(sums_ptr, row, partials, dd, 2, 3)


@triton.jit
def _apgd_l2_mix_kernel(
    adv_ptr, previous_ptr, grad_ptr, top_grad_ptr, clean_ptr, eps_ptr, step_ptr, restart_ptr, std_ptr, sums_ptr,
    squares_ptr, momentum, carry, lower, upper, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    eps, step = tl.load(eps_ptr + row).to(tl.float64), tl.load(step_ptr + row).to(tl.float64)
    restart = tl.load(restart_ptr + row)
    along, shrink = blocks.plan_move(sums_ptr, row, partials, eps, step)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        grad = tl.load(grad_ptr + at, mask=inside & ~restart, other=0.0)
        top_grad = tl.load(top_grad_ptr + at, mask=inside & restart, other=0.0)
        grad = blocks.in_pixels(tl.where(restart, top_grad, grad).to(tl.float32), std_ptr, channel)
        clean = blocks.load_pixels(clean_ptr, at, inside)
        adv = tl.load(adv_ptr + at, mask=inside, other=0.0)
        previous = tl.load(previous_ptr + at, mask=inside, other=0.0)
        stepped = blocks.ascend_l2(adv, grad, clean, along, shrink, lower, upper)
        mixed = adv + momentum * (stepped - adv) + carry * (adv - previous)
        tl.store(previous_ptr + at, mixed, mask=inside)
        far = tl.where(inside, mixed - clean, 0.0).to(tl.float64)
        squares += far * far
    blocks.store_sum(squares_ptr, row, partials, squares, 0, 1)


@triton.jit
def _apgd_l2_project_kernel(
    previous_ptr, clean_ptr, eps_ptr, model_input_ptr, mean_ptr, std_ptr, squares_ptr, lower, upper, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    eps = tl.load(eps_ptr + row).to(tl.float64)
    shrink = blocks.shrink_to(blocks.row_sum(squares_ptr, row, partials, 0, 1), eps)
    lane = tl.arange(0, BLOCK)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        channel = blocks.channel_of(segment, start + first, lane, CHANNELS, INNER)
        clean = blocks.load_pixels(clean_ptr, at, inside)
        new = tl.load(previous_ptr + at, mask=inside, other=0.0)
        new = blocks.clamp(blocks.onto_ball(new, clean, shrink), lower, upper)
        tl.store(previous_ptr + at, new, mask=inside)
        blocks.store_model_input(model_input_ptr, at, inside, new, mean_ptr, std_ptr, channel)


def _linf_step(
    layout: Layout,
    adv: Tensor,
    previous: Tensor,
    grad: Tensor,
    top_adv: Tensor,
    top_grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    improved: Tensor,
    restart: Tensor,
    momentum: float,
    model_input: Tensor | None,
    nonfinite: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    lower: float,
    upper: float,
) -> None:
    walk = layout.walk(BLOCK)
    _apgd_linf_step_kernel[walk.grid](
        adv, previous, grad, top_adv, top_grad, clean, eps, step, improved, restart, model_input, nonfinite, mean, std,
        momentum, 1 - momentum, lower, upper, *walk.sizes, **walk.options,
    )  # fmt: skip


def _l2_step(
    layout: Layout,
    adv: Tensor,
    previous: Tensor,
    grad: Tensor,
    top_adv: Tensor,
    top_grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    improved: Tensor,
    restart: Tensor,
    momentum: float,
    model_input: Tensor | None,
    nonfinite: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    lower: float,
    upper: float,
) -> None:
    walk = layout.walk(SPAN)
    sums = torch.empty(3 * walk.grid[0], dtype=torch.float64, device=adv.device)
    squares = torch.empty(walk.grid[0], dtype=torch.float64, device=adv.device)
    _apgd_l2_sums_kernel[walk.grid](
        adv, grad, top_adv, top_grad, clean, improved, restart, nonfinite, std, sums, walk.partials,
        *walk.sizes, **walk.options,
    )  # fmt: skip
    _apgd_l2_mix_kernel[walk.grid](
        adv, previous, grad, top_grad, clean, eps, step, restart, std, sums, squares, momentum, 1 - momentum,
        lower, upper, walk.partials, *walk.sizes, **walk.options,
    )  # fmt: skip
    _apgd_l2_project_kernel[walk.grid](
        previous, clean, eps, model_input, mean, std, squares, lower, upper, walk.partials,
        *walk.sizes, **walk.options,
    )  # fmt: skip


def _planner(take_step: Callable[..., None]) -> Callable[..., Callable[..., None] | None]:
    def planner(c: ApgdStep) -> Callable[..., None] | None:
        layout = layout_of(
            c.adv, c.clean, grad=c.grad, model_input=c.model_input,
            others=(c.previous, c.top_adv, c.top_grad, c.nonfinite), mean=c.mean, patches=c.patches,
        )  # fmt: skip
        if layout is None:
            return None

        def kernel(
            adv,
            previous,
            grad,
            top_adv,
            top_grad,
            clean,
            eps,
            step,
            improved,
            restart,
            momentum,
            model_input,
            nonfinite,
            mean,
            std,
            _,
            lower,
            upper,
        ):
            with torch.cuda.device_of(adv):
                take_step(
                    layout, adv, previous, grad, top_adv, top_grad, clean, eps.float().contiguous(),
                    step.float().contiguous(), improved.contiguous(), restart.contiguous(), momentum, model_input,
                    nonfinite, small(mean), small(std), lower, upper,
                )  # fmt: skip
            # PyTorch has not seen the writes; without this a backward through the old values would be silently wrong.
            written = (adv, previous, top_adv, top_grad, model_input, nonfinite)
            torch.autograd.graph.increment_version([image for image in written if image is not None])

        return kernel

    return planner


KERNELS: dict[str, Callable[..., Callable[..., None] | None]] = {
    "apgd_linf_step_": _planner(_linf_step),
    "apgd_l2_step_": _planner(_l2_step),
}
