"""Tiles of the logits scale * query @ keys.T, which `info_nce.py` walks, and the gradients from a derivative by them.

query (N, D) and keys (M, D) are contiguous and of one dtype: float32, bfloat16 or float16. Products are summed in
float32. A tile of A rows and B columns reads its rows of query and keys BLOCK_D columns at a time, and is not kept.

The derivative R by the logits is kept for a few thousand rows at a time, in the dtype of the inputs: a gradient is its
product with keys or query, all D columns of it, and those are what cuBLAS is best at. A kernel that kept nothing of R
had to make each tile again for every 128 columns of a gradient (docs/operators.md, "On a GPU").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmai_fast.ops import triton_kernels
from cmai_fast.ops.reference import check_labels

_CARRIED = (torch.float32, torch.bfloat16, torch.float16)

# Of the derivative by the logits: bytes that are kept at once, and rows, beyond which cuBLAS gains nothing.
_RESIDUAL_BYTES = 1 << 29
_RESIDUAL_ROWS = 4096

# Programs enough for eight on each of the 132 multiprocessors of an H100: their last wave then costs little.
_PROGRAMS = 1024


@triton.jit
def load_rows(matrix_ptr, first, count, column, size, ROWS: tl.constexpr):
    """(ROWS, columns) of a (count, size) matrix from its row `first` on, 0 outside of it."""
    # One offset of 64 bits for the tile, and 32 bits inside it: 128 rows of 2^24 columns have fewer than 2^31 elements.
    lane = tl.arange(0, ROWS)
    mask = (lane < count - first)[:, None] & (column < size)[None, :]
    return tl.load(
        matrix_ptr + tl.cast(first, tl.int64) * size + (lane[:, None] * size + column[None, :]), mask=mask, other=0.0
    )


@triton.jit
def store_tile(
    matrix_ptr, tile, first, column_first, count, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes a tile into a (count, columns) matrix of that stride, in the matrix's dtype."""
    lane, column = tl.arange(0, ROWS), column_first + tl.arange(0, COLUMNS)
    mask = (lane < count - first)[:, None] & (column < columns)[None, :]
    at = matrix_ptr + tl.cast(first, tl.int64) * stride + (tl.cast(lane, tl.int64)[:, None] * stride + column[None, :])
    tl.store(at, tile.to(matrix_ptr.dtype.element_ty), mask=mask)


@triton.jit
def products(
    own_ptr, other_ptr, own_first, other_first, own_count, other_count, size,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_A, BLOCK_B) float32: the products of rows of one matrix, from own_first on, with rows of the other."""
    total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for start in range(0, size, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        own = load_rows(own_ptr, own_first, own_count, column, size, BLOCK_A)
        other = load_rows(other_ptr, other_first, other_count, column, size, BLOCK_B)
        total = tl.dot(own, tl.trans(other), total, input_precision=PRECISION)
    return total


@dataclass(frozen=True)
class Blocks:
    """The shape of a tile: A rows of query, B of keys, D columns at a time."""

    a: int
    b: int
    d: int
    warps: int
    stages: int

    def grid(self, matrix: Tensor) -> tuple[int, int]:
        """Programs for a tile of (rows, count) each. Those of one column of tiles run together: they share its keys."""
        return triton.cdiv(matrix.shape[0], self.a), triton.cdiv(matrix.shape[1], self.b)


def carries(query: Tensor, keys: Tensor, *numbers: Tensor) -> bool:
    """Whether the kernels do: 16-bit or 32-bit floats, query and keys alike, on their device, and not empty."""
    return (
        query.dtype == keys.dtype
        and all(tensor.dtype in _CARRIED for tensor in (query, *numbers))
        and query.numel() > 0
        and keys.numel() > 0
        and triton_kernels.runs_on(query)
    )


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32.

    Three TF32 products on tensor cores, of both halves of each factor, keep 22 of its 24 bits; a single one keeps 11,
    and is taken only where the user allows it to PyTorch's own products. "ieee" has no tensor cores.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def assert_labels(labels: Tensor, count: int) -> None:
    """Refuses a label that is no row number of keys: on a GPU by the assertion of `gather`, without waiting for it."""
    if labels.is_cuda:
        labels.new_empty(1).expand(count).gather(0, labels)
    else:
        check_labels(labels, count)


def spans(length: int, block: int, most: int) -> tuple[int, int]:
    """(parts, span): how many programs share `length`, at most `most`, and the multiple of `block` that each takes."""
    span = triton.cdiv(triton.cdiv(length, block), most) * block
    return triton.cdiv(length, span), span


def useful(beside: int) -> int:
    """The programs that the grid needs on one side, where it has `beside` on the other."""
    return max(1, _PROGRAMS // beside)


def _depth(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))  # tl.dot takes no fewer than 16


# The largest tiles tried that spill no register on sm_80, sm_90 and sm_100 where D is a multiple of 16 and at least 64:
# the tests compile them for all three.


def blocks_of(dtype: torch.dtype, size: int, *, columns: bool = False, grouped: bool = False) -> Blocks:
    """By what a kernel holds beside a sum of each row while it walks: sums of columns, groups of rows and columns."""
    if columns and grouped:
        return Blocks(a=64, b=64, d=_depth(size, 32), warps=8, stages=3)
    if dtype == torch.float32 or columns or grouped:
        return Blocks(a=128, b=64, d=_depth(size, 32), warps=8, stages=3)
    return Blocks(a=128, b=128, d=_depth(size, 64), warps=8, stages=3)


def matmul(one: Tensor, other: Tensor) -> Tensor:
    """one @ other in float32, of matrices of one dtype."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.float() @ other.float()


def chunk_rows(rows: int, count: int, dtype: torch.dtype) -> int:
    """Rows of the derivative that are kept at once: whole tiles, so that every chunk is aligned."""
    fit = _RESIDUAL_BYTES // (count * dtype.itemsize) // 128 * 128
    return min(rows, max(128, min(fit, _RESIDUAL_ROWS)))


def pull_back(
    query: Tensor, keys: Tensor, factor: Tensor, write: Callable[[slice, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """factor * R @ keys and factor * R.T @ query, in the dtype of the inputs, where `write(chunk, R)` fills in the rows
    `chunk` of R, (rows of the chunk, M) with a stride of its own."""
    rows, count = query.shape[0], keys.shape[0]
    length = chunk_rows(rows, count, query.dtype)
    kept = query.new_empty(length, triton.cdiv(count, 16) * 16)  # cuBLAS likes its rows aligned
    grad_query, pushed = torch.empty_like(query), None
    for start in range(0, rows, length):
        chunk = slice(start, min(start + length, rows))
        residual = kept[: chunk.stop - start, :count]
        write(chunk, residual)
        grad_query[chunk] = matmul(residual, keys).mul_(factor)
        part = matmul(residual.T, query[chunk])
        pushed = part if pushed is None else pushed.add_(part)
    assert pushed is not None, "no rows: `carries` refuses an empty query"
    return grad_query, pushed.mul_(factor).to(keys.dtype)
