"""A random point of the ball around images (rows, elements): adv = clamp(clean + noise, lower, upper).

One SplitMix64 sequence (Steele, Lea, Flood 2014) for each (seed, sample id), an element taking its index in the row.
L_inf: one pass, the bits of the reference. L2: a pass that writes a Gaussian vector to adv and sums its squares, and
one that scales it to the radius eps * u^(1 / elements), where u is drawn from the element after the row's last.

`reference.py` defines the right result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from cmai_fast.ops.signatures import RandomStart
from cmai_fast.ops.triton_kernels import blocks
from cmai_fast.ops.triton_kernels.blocks import BLOCK, SPAN, layout_of

_GOLDEN = 0x9E3779B97F4A7C15


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _random_bits(sample_ids_ptr, row, element, seed_bits):
    """uint64, of the row's element number `element` (int64, from 0)."""
    start = _mix(seed_bits.to(tl.uint64) ^ _mix(tl.load(sample_ids_ptr + row).to(tl.uint64)))
    return _mix(start + (element + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def _upper_uniform(bits):
    """In (0, 1], from the upper half of the bits."""
    return ((bits >> 32).to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def _gaussian(bits):
    """Box and Muller (1958): sqrt(-2 log u) * cos(2 pi v)."""
    turn = (bits & 0xFFFFFFFF).to(tl.uint32).to(tl.float32) * 2.3283064365386963e-10
    # cos(2 pi v) = sin(2 pi s) with s = |v - 1/2| - 1/4, by its series to s^13, which leaves 1e-9: the library's
    # cosine keeps a table for large angles in local memory.
    s = tl.abs(turn - 0.5) - 0.25
    x = 6.283185307179586 * s
    square = x * x
    tail = -1.0 / 39916800 + square * (1.0 / 6227020800)
    tail = -1.0 / 5040 + square * (1.0 / 362880 + square * tail)
    cosine = x + x * square * (-1.0 / 6 + square * (1.0 / 120 + square * tail))
    return tl.sqrt_rn(-2 * tl.log(_upper_uniform(bits))) * cosine


@triton.jit
def _random_start_linf_kernel(
    adv_ptr, clean_ptr, eps_ptr, sample_ids_ptr, seed_bits: tl.int64, lower, upper,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, _, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    eps = tl.load(eps_ptr + row)
    lane = tl.arange(0, BLOCK)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        bits = _random_bits(sample_ids_ptr, row, start + first + lane, seed_bits)
        # An odd integer below 2^24 in absolute value: exact in float32.
        odd = ((bits >> 40).to(tl.int32) << 1) + 1 - (1 << 24)
        noise = odd.to(tl.float32) * 5.9604644775390625e-08 * eps  # 2^-24
        adv = blocks.clamp(blocks.load_pixels(clean_ptr, at, inside) + noise, lower, upper)
        tl.store(adv_ptr + at, adv, mask=inside)


@triton.jit
def _gaussian_kernel(
    adv_ptr, sample_ids_ptr, seed_bits: tl.int64, squares_ptr, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, _, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        gaussian = _gaussian(_random_bits(sample_ids_ptr, row, start + first + lane, seed_bits))
        tl.store(adv_ptr + at, gaussian, mask=inside)
        wide = tl.where(inside, gaussian, 0.0).to(tl.float64)
        squares += wide * wide
    blocks.store_sum(squares_ptr, row, partials, squares, 0, 1)


@triton.jit
def _random_start_l2_kernel(
    adv_ptr, clean_ptr, eps_ptr, sample_ids_ptr, seed_bits: tl.int64, squares_ptr, inverse_size, lower, upper, partials,
    segment_size, segments, n_blocks, CHANNELS: tl.constexpr, INNER: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, _, start, offset = blocks.place(segment_size, segments, n_blocks, SPAN)
    size = tl.sqrt(blocks.row_sum(squares_ptr, row, partials, 0, 1)).to(tl.float32)
    own = _upper_uniform(_random_bits(sample_ids_ptr, row, tl.cast(segment_size, tl.int64), seed_bits))
    radius = tl.load(eps_ptr + row) * tl.exp(tl.log(own) * inverse_size)
    factor = tl.div_rn(radius, tl.maximum(size, 1e-12))
    lane = tl.arange(0, BLOCK)
    for first in range(0, SPAN, BLOCK):
        inside, at = lane < segment_size - start - first, offset + first + lane
        noise = tl.load(adv_ptr + at, mask=inside, other=0.0) * factor
        adv = blocks.clamp(blocks.load_pixels(clean_ptr, at, inside) + noise, lower, upper)
        tl.store(adv_ptr + at, adv, mask=inside)


def _seed_bits(seed: int) -> int:
    """The seed's part of a row's state, as int64."""
    mask = 2**64 - 1
    bits = (seed + _GOLDEN) & mask
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
    bits ^= bits >> 31
    return bits - 2**64 if bits >> 63 else bits


def _plan_random_start(c: RandomStart) -> Callable[..., None] | None:
    layout = layout_of(c.adv, c.clean)
    if layout is None:
        return None
    walk = layout.walk(BLOCK if c.norm == "linf" else SPAN)

    def kernel(adv, clean, eps, sample_ids, seed, norm, lower, upper):
        eps, sample_ids, seed = eps.float().contiguous(), sample_ids.contiguous(), _seed_bits(seed)
        with torch.cuda.device_of(adv):
            if norm == "linf":
                _random_start_linf_kernel[walk.grid](
                    adv, clean, eps, sample_ids, seed, lower, upper, *walk.sizes, **walk.options
                )
            else:
                squares = torch.empty(walk.grid[0], dtype=torch.float64, device=adv.device)
                _gaussian_kernel[walk.grid](adv, sample_ids, seed, squares, walk.partials, *walk.sizes, **walk.options)
                _random_start_l2_kernel[walk.grid](
                    adv, clean, eps, sample_ids, seed, squares, 1 / layout.segment_size, lower, upper, walk.partials,
                    *walk.sizes, **walk.options,
                )  # fmt: skip
        torch.autograd.graph.increment_version([adv])

    return kernel


KERNELS: dict[str, Callable[..., Callable[..., None] | None]] = {"random_start_": _plan_random_start}
