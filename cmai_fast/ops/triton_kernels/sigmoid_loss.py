"""The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, eq. 1) over logits l = scale * query @ keys.T + bias that are
never stored:

    loss = 1/N (sum_ij softplus(l[i, j]) - sum_i l[i, labels[i]])

and with R = sigmoid(l) - onehot,

    grad_query = scale/N R @ keys,  grad_keys = scale/N R.T @ query,
    grad_scale = 1/N sum R * (query @ keys.T),  grad_bias = 1/N sum R

query (N, D), keys (M, D) in float32, bfloat16 or float16, alike; labels (N,) int64; scale and bias 0-d, read on the
device; loss float32. The programs are those of `info_nce.py`, without log-sum-exps.

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


@triton.jit
def _softplus(logits):
    """log(1 + exp(l)), which neither overflows nor loses what is small: log1p, which Triton lacks, by Kahan's way."""
    small = tl.exp(-tl.abs(logits))
    above_one = 1.0 + small
    rounded = above_one - 1.0
    log1p = tl.where(rounded == 0.0, small, tl.log(above_one) * (small / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.where(logits > 0.0, logits, 0.0) + log1p


@triton.jit
def _sigmoid_loss_forward_kernel(
    query_ptr, keys_ptr, labels_ptr, scale_ptr, bias_ptr, parts_ptr, rows, count, size, span,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_start, first_column = tl.program_id(0) * BLOCK_A, tl.program_id(1) * span
    row = row_start + tl.arange(0, BLOCK_A)
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
    label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
    total = tl.zeros([BLOCK_A], tl.float32)
    for column_start in range(first_column, min(first_column + span, count), BLOCK_B):
        column = column_start + tl.arange(0, BLOCK_B)
        logits = bias + scale * products(
            query_ptr, keys_ptr, row_start, column_start, rows, count, size, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION
        )
        # softplus(l) - l = softplus(-l), without the difference of two large numbers.
        terms = _softplus(tl.where(column[None, :] == label[:, None], -logits, logits))
        total += tl.sum(tl.where((row < rows)[:, None] & (column < count)[None, :], terms, 0.0), 1)
    tl.store(parts_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


@triton.jit
def _sigmoid_loss_backward_kernel(
    query_ptr, keys_ptr, labels_ptr, scale_ptr, bias_ptr, residual_ptr, parts_ptr, rows, count, size, stride,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of R, and its sums of R * (query @ keys.T) and of R."""
    row_start, column_start = tl.program_id(0) * BLOCK_A, tl.program_id(1) * BLOCK_B
    row, column = row_start + tl.arange(0, BLOCK_A), column_start + tl.arange(0, BLOCK_B)
    dots = products(
        query_ptr, keys_ptr, row_start, column_start, rows, count, size, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION
    )
    residual = tl.sigmoid(tl.load(bias_ptr).to(tl.float32) + tl.load(scale_ptr).to(tl.float32) * dots)
    label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
    residual = tl.where(column[None, :] == label[:, None], residual - 1.0, residual)
    residual = tl.where((row < rows)[:, None] & (column < count)[None, :], residual, 0.0)
    store_tile(residual_ptr, residual, row_start, column_start, rows, count, stride, BLOCK_A, BLOCK_B)
    programs = tl.num_programs(0) * tl.num_programs(1)
    here = parts_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(here, tl.sum(residual * dots))
    tl.store(here + programs, tl.sum(residual))


def _plan_sigmoid_loss(
    query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
) -> Callable[..., Tensor] | None:
    if not carries(query, keys, scale, bias):
        return None
    (rows, size), count = query.shape, keys.shape[0]
    blocks = blocks_of(query.dtype, size, "much")
    tiles = triton.cdiv(rows, blocks.a)
    parts, span = spans(count, blocks.b, useful(tiles))

    def kernel(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        assert_labels(labels, count)
        sums = torch.empty(tiles * parts, dtype=torch.float32, device=query.device)
        with torch.cuda.device_of(query):
            _sigmoid_loss_forward_kernel[(tiles, parts)](
                query.contiguous(), keys.contiguous(), labels.contiguous(), scale, bias, sums, rows, count, size, span,
                blocks.a, blocks.b, blocks.d, precision(query.dtype), num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
        return sums.sum() / rows

    return kernel


def _plan_sigmoid_loss_backward(
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None:
    if not carries(query, keys, scale, bias, grad):
        return None
    rows, size = query.shape
    blocks = blocks_of(query.dtype, size, "little")

    def kernel(
        grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, keys, labels = query.contiguous(), keys.contiguous(), labels.contiguous()
        per_row = grad.float() / rows
        sums = []

        def write(chunk: slice, residual: Tensor) -> None:
            parts = torch.empty(2, *blocks.grid(residual), dtype=torch.float32, device=query.device)
            _sigmoid_loss_backward_kernel[parts.shape[1:]](
                query[chunk], keys, labels[chunk], scale, bias, residual, parts, *residual.shape, size,
                residual.stride(0), blocks.a, blocks.b, blocks.d, precision(query.dtype),
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
            sums.append(parts.sum((1, 2)))

        with torch.cuda.device_of(query):
            grad_query, grad_keys = pull_back(query, keys, scale.float() * per_row, write)
        along = per_row * torch.stack(sums).sum(0)
        # Apart: two results of an operator may not share memory.
        return grad_query, grad_keys, along[0].to(scale.dtype, copy=True), along[1].to(bias.dtype, copy=True)

    return kernel


KERNELS: dict[str, Callable[..., Callable[..., Any] | None]] = {
    "sigmoid_loss": _plan_sigmoid_loss,
    "sigmoid_loss_backward": _plan_sigmoid_loss_backward,
}
