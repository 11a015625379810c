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
    backward_blocks,
    carries,
    forward_blocks,
    load_rows,
    precision,
    products,
    spans,
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
    grad_ptr, own_ptr, other_ptr, labels_ptr, scale_ptr, bias_ptr, grad_own_ptr, parts_ptr,
    own_count, other_count, size, OF_KEYS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the query, or with OF_KEYS of the keys: then all tiles are transposed."""
    own_first = tl.program_id(0) * BLOCK_A
    own_row = own_first + tl.arange(0, BLOCK_A)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float32)
    pulled = tl.zeros([BLOCK_A, BLOCK_OUT], tl.float32)
    along_scale = tl.zeros([BLOCK_A], tl.float32)
    along_bias = tl.zeros([BLOCK_A], tl.float32)
    for start in range(0, other_count, BLOCK_B):
        other_row = start + tl.arange(0, BLOCK_B)
        dots = products(
            own_ptr, other_ptr, own_first, start, own_count, other_count, size, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION
        )
        logits = bias + scale * dots
        if OF_KEYS:
            row, rows, column, count = other_row[None, :], other_count, own_row[:, None], own_count
        else:
            row, rows, column, count = own_row[:, None], own_count, other_row[None, :], other_count
        label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
        residual = tl.sigmoid(logits)
        residual = tl.where(column == label, residual - 1.0, residual)
        residual = tl.where((row < rows) & (column < count), residual, 0.0)
        if parts_ptr is not None:
            along_scale += tl.sum(residual * dots, 1)
            along_bias += tl.sum(residual, 1)
        other = load_rows(other_ptr, start, other_count, out, size, BLOCK_B)
        # In the dtype of the inputs, as PyTorch's own products take it: half precision on tensor cores.
        pulled = tl.dot(residual.to(other.dtype), other, pulled, input_precision=PRECISION)
    rows = other_count if OF_KEYS else own_count
    per_row = tl.load(grad_ptr).to(tl.float32) / rows
    at = grad_own_ptr + tl.cast(own_first, tl.int64) * size + tl.arange(0, BLOCK_A)[:, None] * size + out[None, :]
    mask = (own_row < own_count)[:, None] & (out < size)[None, :]
    tl.store(at, (scale * per_row * pulled).to(grad_own_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(parts_ptr + tl.program_id(0), per_row * tl.sum(along_scale))
            tl.store(parts_ptr + tl.num_programs(0) + tl.program_id(0), per_row * tl.sum(along_bias))


def _plan_sigmoid_loss(
    query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
) -> Callable[..., Tensor] | None:
    if not carries(query, keys, scale, bias):
        return None
    (rows, size), count = query.shape, keys.shape[0]
    blocks = forward_blocks(query.dtype, size, rows_alone=False)
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
    (rows, size), blocks = query.shape, backward_blocks(query.dtype, query.shape[1])
    outs = triton.cdiv(size, blocks.out)

    def kernel(
        grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, keys, labels = query.contiguous(), keys.contiguous(), labels.contiguous()
        grad_query, grad_keys = torch.empty_like(query), torch.empty_like(keys)
        sums = torch.empty(2, triton.cdiv(rows, blocks.a), dtype=torch.float32, device=query.device)
        sides = ((query, keys, grad_query, sums), (keys, query, grad_keys, None))
        with torch.cuda.device_of(query):
            for of_keys, (own, other, grad_own, parts) in enumerate(sides):
                _sigmoid_loss_backward_kernel[(triton.cdiv(own.shape[0], blocks.a), outs)](
                    grad, own, other, labels, scale, bias, grad_own, parts,
                    own.shape[0], other.shape[0], size, bool(of_keys),
                    blocks.a, blocks.b, blocks.d, blocks.out, precision(query.dtype),
                    num_warps=blocks.warps, num_stages=blocks.stages,
                )  # fmt: skip
        # Apart: two results of an operator may not share memory.
        return grad_query, grad_keys, sums[0].sum().to(scale.dtype), sums[1].sum().to(bias.dtype)

    return kernel


KERNELS: dict[str, Callable[..., Callable[..., Any] | None]] = {
    "sigmoid_loss": _plan_sigmoid_loss,
    "sigmoid_loss_backward": _plan_sigmoid_loss_backward,
}
