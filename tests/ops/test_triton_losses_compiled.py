"""The Triton kernels of cosine_heads and info_nce, compiled for GPUs that need not be here: tensor cores,
registers, spills, width of accesses; and the memory that their launchers ask for at sizes that no test could run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from cmai_fast.ops import triton_kernels
from cmai_fast.ops.triton_kernels import logits
from compiled_kernels import CAPABILITIES, Binary, compile_launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Registers per thread on sm_90, at most, for float32 and for half precision. The tiled kernels have 256 threads: two
# programs fit a multiprocessor up to 128 registers, and one up to 255. There a tile should be as large as it can be
# without spilling, and where others of the three GPUs need all 255, this is what is left to check.
BUDGETS = {
    "_cosine_heads_kernel": (104, 104),
    "_cosine_heads_backward_kernel": (104, 104),
    "_combine_kernel": (32, 32),
    "_info_nce_forward_kernel": (255, 255),
    "_info_nce_backward_kernel": (232, 184),
}
# Groups of 64 bits for each row and column come on top.
GROUPED = {"_info_nce_backward_kernel": (232, 232)}
TILED = [name for name in BUDGETS if name.startswith("_info")]
# What multiplies matrices: mma, wgmma, tcgen05.
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def arguments(operator: str, rows: int, count: int, size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    if operator.startswith("cosine"):
        image, text = torch.zeros(rows, 2, size, dtype=dtype), torch.zeros(rows, 2, size, dtype=dtype)
        return (torch.zeros(rows, 2), image, text) if operator.endswith("backward") else (image, text)
    query, keys = torch.zeros(rows, size, dtype=dtype), torch.zeros(count, size, dtype=dtype)
    batch: tuple[Any, ...] = (query, keys, torch.zeros(rows, dtype=torch.int64), torch.tensor(14.0))
    if operator.endswith("backward"):
        batch = (torch.tensor(1.0), *batch)
    both = "symmetric" in operator
    groups = torch.zeros(count, dtype=torch.int64) if "grouped" in operator else None
    lse = (torch.zeros(rows), torch.zeros(count if both else 0))
    return (*batch, *lse, groups) if operator.endswith("backward") else (*batch, both, groups)


OPERATORS = [
    "cosine_heads", "cosine_heads_backward", "info_nce", "symmetric info_nce", "symmetric grouped info_nce",
    "info_nce_backward", "symmetric info_nce_backward", "symmetric grouped info_nce_backward",
]  # fmt: skip


def planned(operator: str, case: tuple[Any, ...]) -> Callable[..., Any] | None:
    return triton_kernels.KERNELS[operator.split()[-1]](*case)


def compiled(capability: int, operator: str, *sizes: int, dtype: torch.dtype) -> list[Binary]:
    def run() -> None:
        case = arguments(operator, *sizes, dtype)
        kernel = planned(operator, case)
        assert kernel is not None, f"{operator}: not carried"
        kernel(*case)

    return compile_launches(capability, run)


# A kernel takes seconds to compile: half precision for every GPU, float32 for one.
@pytest.mark.parametrize("capability, dtype", [*((c, torch.bfloat16) for c in CAPABILITIES), (90, torch.float32)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_tensor_cores_no_spills_wide_loads(operator: str, dtype: torch.dtype, capability: int) -> None:
    binaries = compiled(capability, operator, 256, 512, 512, dtype=dtype)
    assert binaries
    for binary in binaries:
        assert binary.spilled == 0 and binary.count("LDL") == 0 and binary.count("STL") == 0, f"{binary} spills"
        if capability == 90:
            budgets = BUDGETS | GROUPED if "grouped" in operator else BUDGETS
            assert binary.registers <= budgets[binary.name][dtype != torch.float32], binary
        # So the kernels run on the smaller GPUs of a generation too, whose programs have 99 KB.
        assert binary.shared <= 99 * 1024, binary
        # Its error is absolute, and the loss of a pair that is almost certain is small.
        assert binary.count("MUFU.LG2") == 0, f"{binary.name} takes the approximate logarithm"
        if binary.name in TILED:
            assert binary.count(TENSOR_CORES[capability]) > 0, f"{binary.name}: no {TENSOR_CORES[capability]}"
            copies = binary.count("LDGSTS")
            assert 0 < copies == binary.count("LDGSTS.E.BYPASS.128"), f"{binary.name}: narrow copies"
            if capability == 90:
                assert binary.count("HMMA") == 0, f"{binary.name}: not all products are wgmma"
        if binary.name.startswith("_cosine"):
            assert binary.count("LDG.E.128") >= 4, binary
        if binary.name.endswith("backward_kernel"):
            assert binary.count("STG.E.128") >= 4, binary


@pytest.mark.parametrize("operator", ["symmetric grouped info_nce", "symmetric grouped info_nce_backward"])
def test_rows_that_are_not_aligned_run_on_tensor_cores_too(operator: str) -> None:
    for binary in compiled(90, operator, 130, 67, 33, dtype=torch.bfloat16):
        if binary.name in TILED:
            # They need an address for every element: a few do not fit, which is let pass for a width so rare.
            assert binary.count("HGMMA") > 0 and binary.spilled <= 64, binary
            assert binary.count("LDGSTS.E.BYPASS.128") == 0, "33 halves are not aligned"


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_keeps_its_precision_unless_the_user_gives_it_up(allowed: bool) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        (binary, *_) = compiled(90, "info_nce_backward", 256, 512, 512, dtype=torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    right, wrong = ("tf32", "tf32x3") if allowed else ("tf32x3", "tf32")
    assert f"inputPrecision = {right} :" in binary.ttir and f"inputPrecision = {wrong} :" not in binary.ttir


class Allocated(TorchDispatchMode):
    """Counts the bytes of every new tensor that an operation under it returned, as if none were given back."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or any(argument.alias_info is not None for argument in func._schema.returns):
            return out
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.size += tensor.numel() * tensor.element_size()
        return out


@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if not operator.startswith("cosine")])
def test_memory_is_linear_in_the_batch(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 64 partial sums and a few numbers for each row and column, the gradients, and half a GiB of the
    derivative: not the 17 GB of logits."""
    rows = count = 1 << 16
    size = 512  # that of the test above, which has compiled these kernels
    chunks = rows // logits.chunk_rows(rows, count, torch.bfloat16)
    case = arguments(operator, rows, count, size, torch.bfloat16)
    allocated = Allocated()

    def run() -> None:
        kernel = planned(operator, case)
        assert kernel is not None
        with allocated:
            kernel(*case)

    # Their results are counted, not made: it would take a CPU minutes.
    monkeypatch.setattr(logits, "matmul", lambda one, other: torch.empty(one.shape[0], other.shape[1]))
    compile_launches(90, run)
    kept = 0
    if operator.endswith("backward"):
        assert chunks == 16
        # The gradients, first in float32, that of the keys once a chunk: PyTorch gives back each before the next.
        kept = 2**29 + (2 + 4) * rows * size + (2 + 4 * chunks) * count * size
    assert 0 < allocated.size <= kept + (rows + count) * 4 * (64 + 16)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_carried_is_left_to_the_reference(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = arguments(operator, 4, 5, 6, torch.float16)
    assert planned(operator, case) is None, "a tensor on the CPU, without the interpreter"
    monkeypatch.setattr(triton_kernels, "runs_on", lambda tensor: True)
    assert planned(operator, case) is not None
    floats = [number for number, value in enumerate(case) if isinstance(value, Tensor) and value.is_floating_point()]
    for number in floats:
        assert planned(operator, (*case[:number], case[number].double(), *case[number + 1 :])) is None, number
    assert planned(operator, arguments(operator, 0, 5, 6, torch.float16)) is None
    assert planned(operator, arguments(operator, 4, 5, 0, torch.float16)) is None
    if not operator.startswith("cosine"):
        keys = 2 if operator.endswith("backward") else 1
        assert planned(operator, (*case[:keys], case[keys].bfloat16(), *case[keys + 1 :])) is None


def test_every_kernel_has_a_budget() -> None:
    kernels = {
        name
        for module in ("cosine_heads", "info_nce")
        for name, value in vars(importlib.import_module(f"{triton_kernels.__name__}.{module}")).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == set(BUDGETS)
