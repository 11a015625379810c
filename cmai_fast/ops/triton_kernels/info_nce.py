"""The InfoNCE loss (van den Oord et al. 2018, eq. 4) over logits l = scale * query @ keys.T that are never stored:

    loss = 1/N sum_i (row_lse[i] - l[i, labels[i]]),  row_lse[i] = log sum_j exp l[i, j]

and with both directions (CLIP) its mean with 1/N sum_i (column_lse[labels[i]] - l[i, labels[i]]). With n_j rows of
label j and R = exp(l - row_lse) - onehot, or (exp(l - row_lse) + n_j exp(l - column_lse)) / 2 - onehot,

    grad_query = scale/N R @ keys,  grad_keys = scale/N R.T @ query,  grad_scale = 1/N sum R * (query @ keys.T)

With groups the logits of the other keys of the group of a row's own key are -inf, and R is 0 there.

query (N, D), keys (M, D) in float32, bfloat16 or float16, alike; labels (N,) and groups (M,) int64; scale 0-d, read on
the device; loss and log-sum-exps float32.

Forward: a program walks a run of row tiles against a span of key tiles, with a running maximum and sum per row, and
leaves a log-sum-exp of its part for each row and each column, which a second kernel combines. Both directions so come
from one pass over the logits. Runs and spans are at most _MOST_PARTS, so memory is O((N + M) D) for the gradients and
O((N + M) _MOST_PARTS) for these. Backward: a kernel makes the logits again and writes R for a few thousand rows, whose
products are the gradients (`logits.pull_back`). No two programs add to one number, so results do not depend on what
runs first.

`reference.py` defines the right result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmai_fast.ops.triton_kernels.logits import (
    assert_labels,
    blocks_of,
    carries,
    precision,
    products,
    pull_back,
    spans,
    store_tile,
    useful,
)

# Log-sum-exps that are kept for one row or column: 256 bytes, less than a row of 64 float32 itself.
_MOST_PARTS = 64


@triton.jit
def _shift(peak):
    """What may be taken off before exp: an infinite maximum would give inf - inf."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def _add_lse(one, other):
    """log(exp(one) + exp(other))."""
    shift = _shift(tl.maximum(one, other))
    return shift + tl.log(tl.exp(one - shift) + tl.exp(other - shift))


@triton.jit
def _left_out(own_groups_ptr, groups_ptr, row, column, label, rows, count):
    """Where a tile has other keys of the group that its rows' own keys belong to."""
    own_group = tl.load(own_groups_ptr + row, mask=row < rows, other=0)
    group = tl.load(groups_ptr + column, mask=column < count, other=0)
    return (own_group[:, None] == group[None, :]) & (label[:, None] != column[None, :])


@triton.jit
def _info_nce_forward_kernel(
    query_ptr, keys_ptr, labels_ptr, scale_ptr, own_groups_ptr, groups_ptr, own_ptr, row_parts_ptr, column_parts_ptr,
    rows, count, size, run, span, SYMMETRIC: tl.constexpr, GROUPED: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row, first_column = tl.program_id(0) * run, tl.program_id(1) * span
    scale = tl.load(scale_ptr).to(tl.float32)
    for row_start in range(first_row, min(first_row + run, rows), BLOCK_A):
        row = row_start + tl.arange(0, BLOCK_A)
        label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
        peak = tl.full([BLOCK_A], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_A], tl.float32)
        own = tl.zeros([BLOCK_A], tl.float32)
        for column_start in range(first_column, min(first_column + span, count), BLOCK_B):
            column = column_start + tl.arange(0, BLOCK_B)
            logits = scale * products(
                query_ptr, keys_ptr, row_start, column_start, rows, count, size, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION
            )
            inside = (row < rows)[:, None] & (column < count)[None, :]
            if GROUPED:
                inside = inside & ~_left_out(own_groups_ptr, groups_ptr, row, column, label, rows, count)
            logits = tl.where(inside, logits, float("-inf"))
            own += tl.sum(tl.where(column[None, :] == label[:, None], logits, 0.0), 1)
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            shift = _shift(new_peak)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            peak = new_peak
            if SYMMETRIC:
                shift = _shift(tl.max(logits, 0))
                lse = shift + tl.log(tl.sum(tl.exp(logits - shift[None, :]), 0))
                at = column_parts_ptr + tl.program_id(0).to(tl.int64) * count + column
                if row_start > first_row:
                    lse = _add_lse(tl.load(at, mask=column < count, other=0.0), lse)
                tl.store(at, lse, mask=column < count)
                # What this tile's threads wrote, others of the program read at the next row tile.
                tl.debug_barrier()
        at = row_parts_ptr + tl.program_id(1).to(tl.int64) * rows + row
        tl.store(at, _shift(peak) + tl.log(total), mask=row < rows)
        # One span holds a row's label.
        here = (label >= first_column) & (label < first_column + span)
        tl.store(own_ptr + row, own, mask=(row < rows) & here)


@triton.jit
def _combine_kernel(parts_ptr, lse_ptr, parts, size, BLOCK: tl.constexpr):
    """lse (size,) = log sum exp over the rows of parts (parts, size)."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lse = tl.load(parts_ptr + lane, mask=lane < size, other=0.0)
    for part in range(1, parts):
        at = parts_ptr + tl.cast(part, tl.int64) * size + lane
        lse = _add_lse(lse, tl.load(at, mask=lane < size, other=0.0))
    tl.store(lse_ptr + lane, lse, mask=lane < size)


@triton.jit
def _info_nce_backward_kernel(
    query_ptr, keys_ptr, labels_ptr, scale_ptr, own_groups_ptr, groups_ptr, row_lse_ptr, column_lse_ptr, owners_ptr,
    residual_ptr, parts_ptr, rows, count, size, stride, SYMMETRIC: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of R, and its sum of R * (query @ keys.T)."""
    row_start, column_start = tl.program_id(0) * BLOCK_A, tl.program_id(1) * BLOCK_B
    row, column = row_start + tl.arange(0, BLOCK_A), column_start + tl.arange(0, BLOCK_B)
    dots = products(
        query_ptr, keys_ptr, row_start, column_start, rows, count, size, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION
    )
    logits = tl.load(scale_ptr).to(tl.float32) * dots
    residual = tl.exp(logits - tl.load(row_lse_ptr + row, mask=row < rows, other=0.0)[:, None])
    if SYMMETRIC:
        owners = tl.load(owners_ptr + column, mask=column < count, other=0.0)[None, :]
        column_lse = tl.load(column_lse_ptr + column, mask=column < count, other=0.0)[None, :]
        residual = (residual + owners * tl.exp(logits - column_lse)) * 0.5
    label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
    residual = tl.where(column[None, :] == label[:, None], residual - 1.0, residual)
    inside = (row < rows)[:, None] & (column < count)[None, :]
    if GROUPED:
        inside = inside & ~_left_out(own_groups_ptr, groups_ptr, row, column, label, rows, count)
    # Last, since a column that is left out in all rows has a log-sum-exp of -inf, and exp of that difference is NaN.
    residual = tl.where(inside, residual, 0.0)
    store_tile(residual_ptr, residual, row_start, column_start, rows, count, stride, BLOCK_A, BLOCK_B)
    tl.store(parts_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(residual * dots))


def _combine(parts: Tensor) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0]
    lse = parts.new_empty(parts.shape[1])
    _combine_kernel[(triton.cdiv(parts.shape[1], 256),)](parts, lse, *parts.shape, 256)
    return lse


def _own_groups(labels: Tensor, groups: Tensor | None) -> Tensor | None:
    return None if groups is None else groups[labels]


def _plan_info_nce(
    query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, symmetric: bool = False, groups: Tensor | None = None
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    if not carries(query, keys, scale):
        return None
    (rows, size), count = query.shape, keys.shape[0]
    blocks = blocks_of(query.dtype, size, columns=symmetric, grouped=groups is not None)
    # In one direction nothing is kept per column, and every row tile is a run.
    runs, run = spans(rows, blocks.a, _MOST_PARTS if symmetric else rows)
    parts, span = spans(count, blocks.b, min(_MOST_PARTS, useful(runs)))

    def kernel(
        query: Tensor,
        keys: Tensor,
        labels: Tensor,
        scale: Tensor,
        symmetric: bool = False,
        groups: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert_labels(labels, count)
        query, keys, labels = query.contiguous(), keys.contiguous(), labels.contiguous()
        groups = None if groups is None else groups.contiguous()
        numbers = torch.empty(0, dtype=torch.float32, device=query.device)
        own, row_parts = numbers.new_empty(rows), numbers.new_empty(parts, rows)
        column_parts = numbers.new_empty(runs, count) if symmetric else None
        with torch.cuda.device_of(query):
            _info_nce_forward_kernel[(runs, parts)](
                query, keys, labels, scale, _own_groups(labels, groups), groups, own, row_parts, column_parts,
                rows, count, size, run, span, symmetric, groups is not None,
                blocks.a, blocks.b, blocks.d, precision(query.dtype), num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
            row_lse = _combine(row_parts)
            if column_parts is None:
                return (row_lse - own).mean(), row_lse, numbers
            column_lse = _combine(column_parts)
        return ((row_lse - own) + (column_lse[labels] - own)).mean() / 2, row_lse, column_lse

    return kernel


def _plan_info_nce_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    groups: Tensor | None = None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    if not carries(query, keys, scale, grad) or row_lse.dtype != torch.float32 or column_lse.dtype != torch.float32:
        return None
    (rows, size), count = query.shape, keys.shape[0]
    symmetric = column_lse.shape[0] > 0
    blocks = blocks_of(query.dtype, size)

    def kernel(
        grad: Tensor,
        query: Tensor,
        keys: Tensor,
        labels: Tensor,
        scale: Tensor,
        row_lse: Tensor,
        column_lse: Tensor,
        groups: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, keys, labels = query.contiguous(), keys.contiguous(), labels.contiguous()
        row_lse, column_lse = row_lse.contiguous(), column_lse.contiguous()
        # Sums of ones: exact, so that their order does not matter.
        owners = column_lse.new_zeros(count).scatter_add_(0, labels, torch.ones_like(row_lse)) if symmetric else None
        groups = None if groups is None else groups.contiguous()
        own_groups = _own_groups(labels, groups)
        per_row = grad.float() / rows
        sums = []

        def write(chunk: slice, residual: Tensor) -> None:
            parts = row_lse.new_empty(blocks.grid(residual))
            _info_nce_backward_kernel[parts.shape](
                query[chunk], keys, labels[chunk], scale, None if own_groups is None else own_groups[chunk], groups,
                row_lse[chunk], column_lse if symmetric else None, owners, residual, parts, *residual.shape, size,
                residual.stride(0), symmetric, groups is not None,
                blocks.a, blocks.b, blocks.d, precision(query.dtype), num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
            sums.append(parts.sum())

        with torch.cuda.device_of(query):
            grad_query, grad_keys = pull_back(query, keys, scale.float() * per_row, write)
        return grad_query, grad_keys, (per_row * torch.stack(sums).sum()).to(scale.dtype)

    return kernel


KERNELS: dict[str, Callable[..., Callable[..., Any] | None]] = {
    "info_nce": _plan_info_nce,
    "info_nce_backward": _plan_info_nce_backward,
}
