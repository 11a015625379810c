"""The Triton kernels of the gated activation, compiled for GPUs that need not be here: registers, spills, width of
accesses, and how few instructions an element takes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from cmai_fast.ops import triton_kernels
from cmai_fast.ops.triton_kernels import gated_activation
from compiled_kernels import CAPABILITIES, Binary, check_offsets, check_spills, compile_launches

# Registers per thread at most, for half precision and for float32, and instructions for each of a thread's 8 elements.
# A multiprocessor has 65536 registers: 48 a thread leave room for 10 programs of 4 warps, 64 for 8. While an H200 moves
# a byte (4.8 TB/s), its 16896 lanes do 6 instructions (at 1.75 GHz): for the 6 bytes of a forward pass 37.
BUDGETS = {"_gated_activation_kernel": (40, 48, 30), "_gated_activation_backward_kernel": (48, 64, 40)}


def compiled(capability: int, shape: tuple[int, ...], dtype: torch.dtype, gated: bool) -> list[Binary]:
    x = torch.zeros(shape, dtype=dtype)
    other, grad = x.clone() if gated else None, x.clone()

    def run() -> None:
        for name, case in (("", (x, other, "silu")), ("_backward", (grad, x, other, "silu"))):
            kernel = triton_kernels.KERNELS[f"gated_activation{name}"](*case)
            assert kernel is not None
            kernel(*case)

    return compile_launches(capability, run)


# A kernel takes seconds to compile: what a language model runs for every GPU, the others for one.
@pytest.mark.parametrize(
    "capability, dtype, gated",
    [*((c, torch.bfloat16, True) for c in CAPABILITIES), (90, torch.bfloat16, False), (90, torch.float16, True),
     (90, torch.float32, True)],
)  # fmt: skip
def test_no_spills_few_registers_wide_accesses(capability: int, dtype: torch.dtype, gated: bool) -> None:
    binaries = compiled(capability, (577, 1024), dtype, gated)
    assert {binary.name for binary in binaries} == set(BUDGETS)
    for binary in binaries:
        half, single, instructions = BUDGETS[binary.name]
        check_spills(binary)
        check_offsets(binary)
        assert binary.registers <= (single if dtype == torch.float32 else half), binary
        backward = binary.name.endswith("backward_kernel")
        accesses = 2 if dtype == torch.float32 else 1  # of 128 bits, for 8 elements
        assert binary.count("LDG.E") == binary.count("LDG.E.128") == (1 + gated + backward) * accesses, binary
        assert binary.count("STG.E") == binary.count("STG.E.128") == (1 + gated * backward) * accesses, binary
        assert "ttg.convert_layout" not in binary.ttgir, binary
        assert binary.count("BRA") <= 2, f"{binary.name} has a branch per element"
        if capability == 90:
            count = len(re.findall(r"/\*[0-9a-f]{4}\*/\s+\S", binary.sass))
            assert count <= 8 * instructions, f"{binary.name}: {count} instructions"


def test_a_size_that_is_not_aligned_has_the_same_arithmetic() -> None:
    """So a row does not depend on its batch: neither kernel has a product that is fused with a sum."""
    for binaries in zip(*(compiled(90, shape, torch.float32, True) for shape in ((577, 1024), (3, 5, 7))), strict=True):
        for binary in binaries:
            check_spills(binary)
            assert binary.count("FFMA") == 0, binary
        assert binaries[1].count("LDG.E.128") == 0
        for instruction in ("MUFU.EX2", "MUFU.RCP"):
            assert binaries[0].count(instruction) == binaries[1].count(instruction) > 0


def test_what_is_not_carried_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(x: Tensor) -> list[bool]:
        kernels = triton_kernels.KERNELS
        forward = kernels["gated_activation"](x, x.clone(), "silu")
        backward = kernels["gated_activation_backward"](x.clone(), x, None, "silu")
        return [forward is not None, backward is not None]

    x = torch.zeros(4, 6)
    assert planned(x) == [False, False], "a tensor on the CPU, without the interpreter"
    monkeypatch.setattr(triton_kernels, "runs_on", lambda tensor: True)
    assert planned(x) == planned(x.mT) == [True, True]
    assert planned(x.double()) == planned(x[:0]) == [False, False]


def test_every_kernel_has_a_budget() -> None:
    kernels = {
        name
        for name, value in vars(gated_activation).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == set(BUDGETS)
