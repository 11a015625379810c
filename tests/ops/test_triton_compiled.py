"""The Triton kernels of the steps, compiled for GPUs that need not be here: registers, spills, width of accesses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from cmai_fast.ops import triton_kernels
from cmai_fast.ops.signatures import STEPS
from compiled_kernels import CAPABILITIES, Binary, check_offsets, check_spills, compile_launches

# 224 x 224 pixels: a channel is a multiple of 16 elements, and too long for one program.
IMAGES = (2, 3, 224, 224)

# Per thread: registers at most, and 128-bit loads and stores at least, one for each float32 image. A multiprocessor has
# 65536 registers and room for 8 programs of 8 warps: 32 registers fill it, 40 leave room for 6, 64 for 4, 80 for 3.
BUDGETS = {
    "_pgd_linf_step_kernel": (32, 1, 1),
    "_l1_sums_kernel": (40, 0, 0),
    "_velocity_kernel": (32, 1, 1),
    "_pgd_l2_sums_kernel": (72, 1, 0),
    "_pgd_l2_step_kernel": (48, 1, 1),
    "_apgd_linf_step_kernel": (32, 3, 3),
    "_apgd_l2_sums_kernel": (80, 2, 2),
    "_apgd_l2_mix_kernel": (64, 2, 1),
    "_apgd_l2_project_kernel": (32, 1, 1),
    "_random_start_linf_kernel": (32, 0, 1),
    "_gaussian_kernel": (40, 0, 1),
    "_random_start_l2_kernel": (32, 1, 1),
}


def arguments(operator: str, shape: tuple[int, ...], *, momentum: bool = False) -> dict[str, Any]:
    """A call with every option that makes a kernel larger, and the narrow dtypes that threaten the wide accesses."""
    rows = shape[0]
    case: dict[str, Any] = {"adv": torch.zeros(shape), "clean": torch.zeros(shape, dtype=torch.uint8)}
    case["eps"] = torch.zeros(rows)
    if operator == "random_start_":
        return case | {"sample_ids": torch.arange(rows), "seed": 2**40}
    case |= {"grad": torch.zeros(shape, dtype=torch.bfloat16), "step": torch.zeros(rows)}
    case |= {"model_input": torch.zeros(shape, dtype=torch.bfloat16), "mean": torch.zeros(3), "std": torch.ones(3)}
    case["nonfinite"] = torch.zeros(rows, dtype=torch.int64)
    flags = torch.zeros(rows, dtype=torch.bool)
    if operator.startswith("pgd"):
        return case | {"active": flags} | ({"velocity": torch.zeros(shape), "decay": 0.9} if momentum else {})
    case |= {"previous": torch.zeros(shape), "top_adv": torch.zeros(shape), "top_grad": case["grad"].clone()}
    return case | {"improved": flags, "restart": flags.clone(), "momentum": 0.75}


def launch(operator: str, case: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        call = STEPS[operator](**case)
        kernel = triton_kernels.KERNELS[operator](call)
        assert kernel is not None, f"{operator}: not carried"
        kernel(*call)

    return run


LAUNCHES = {
    "pgd linf": ("pgd_linf_step_", {}),
    "pgd l2": ("pgd_l2_step_", {}),
    "momentum": ("pgd_linf_step_", {"momentum": True}),
    "apgd linf": ("apgd_linf_step_", {}),
    "apgd l2": ("apgd_l2_step_", {}),
    "start linf": ("random_start_", {"norm": "linf"}),
    "start l2": ("random_start_", {"norm": "l2"}),
}


def case_of(name: str, shape: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    operator, options = LAUNCHES[name]
    if operator == "random_start_":
        return operator, arguments(operator, shape) | options
    return operator, arguments(operator, shape, **options)


def check_widths(binary: Binary) -> None:
    _, loads, stores = BUDGETS[binary.name]
    assert binary.count("LDG.E.128") >= loads, f"{binary}: {binary.count('LDG.E.128')} of {loads} wide loads"
    assert binary.count("STG.E.128") >= stores, f"{binary}: {binary.count('STG.E.128')} of {stores} wide stores"
    # One register layout from load to store; the Gaussian alone, which loads nothing, has another to draw in.
    assert binary.ttgir.count("ttg.convert_layout") <= (binary.name == "_gaussian_kernel"), binary.name


# A kernel takes seconds to compile: all for one GPU, the largest for the others.
@pytest.mark.parametrize(
    "name, capability",
    [(name, 90) for name in LAUNCHES] + [(name, c) for name in ("pgd l2", "apgd l2") for c in CAPABILITIES if c != 90],
)
def test_no_spills_few_registers_wide_accesses(name: str, capability: int) -> None:
    binaries = compile_launches(capability, launch(*case_of(name, IMAGES)))
    assert binaries
    for binary in binaries:
        check_spills(binary)
        check_widths(binary)
        check_offsets(binary)
        assert binary.registers <= BUDGETS[binary.name][0], binary


@pytest.mark.parametrize("name", ["pgd linf", "pgd l2", "apgd l2"])
def test_flattened_patches_are_read_as_wide(name: str) -> None:
    operator, case = case_of(name, (2, 16, 3 * 196))
    for binary in compile_launches(90, launch(operator, {**case, "patches": 16})):
        check_spills(binary)
        check_widths(binary)


@pytest.mark.parametrize("name", ["pgd l2", "apgd linf"])
def test_unaligned_rows_do_not_spill(name: str) -> None:
    binaries = compile_launches(90, launch(*case_of(name, (2, 3, 65, 97))))
    for binary in binaries:
        check_spills(binary)
    assert binaries[-1].count("STG.E") > 0 and binaries[-1].count("STG.E.128") == 0


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_is_not_carried_is_left_to_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, case = case_of(name, (2, 3, 4, 4))

    def planner(**case: Any) -> Any:
        return triton_kernels.KERNELS[operator](STEPS[operator](**case))

    assert planner(**case) is None, "a tensor on the CPU, without the interpreter"
    monkeypatch.setattr(triton_kernels, "runs_on", lambda tensor: True)
    assert planner(**case) is not None
    assert planner(**case | {"clean": case["clean"].mT}) is None
    assert planner(**case | {"adv": case["adv"].double()}) is None
    assert planner(**case | {key: case[key][:, :, :0] for key in ("adv", "clean")}) is None
    if "grad" in case:
        assert planner(**case | {"grad": case["grad"].double()}) is None
        assert planner(**case | {"model_input": case["model_input"].double()}) is None
        assert planner(**case | {"nonfinite": torch.zeros(4, dtype=torch.int64)[::2]}) is None


def test_every_kernel_has_a_budget() -> None:
    kernels = {
        name
        for module in ("pgd_step", "velocity", "apgd_step", "random_start")
        for name, value in vars(importlib.import_module(f"{triton_kernels.__name__}.{module}")).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == set(BUDGETS)
