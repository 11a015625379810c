"""Who carries out an operator: what the tests of operators are run over.

Triton's kernels need a CUDA device, or a process that was started with TRITON_INTERPRET=1, since Triton decides at its
import. Such a process has no other implementation, and `tests/ops/test_triton_interpreted.py` starts it: the same tests
run there as here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulation
import quick_interpreter
from cmai_fast import ops
from cmai_fast.ops import cpu, cuda, reference, triton_kernels
from cmai_fast.ops.signatures import STEPS

INTERPRETED = triton_kernels.interpreted()
if INTERPRETED:
    quick_interpreter.make_quick()


@dataclass(frozen=True)
class Implementation:
    """`implementation(operator)` takes and gives tensors on the CPU, wherever the kernel runs."""

    operator: Callable[[str], Callable[..., Any]]
    device: str = "cpu"

    @property
    def garbles_bfloat16(self) -> bool:
        """Triton's interpreter drops the low bits where a GPU rounds to nearest, and misreads subnormal numbers."""
        return INTERPRETED

    def __call__(self, name: str) -> Callable[..., Any]:
        operator = self.operator(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            there = [
                value.to(self.device) if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())
            ]
            result = operator(*there[: len(args)], **dict(zip(kwargs, there[len(args) :], strict=True)))
            with torch.no_grad():  # leaves that require grad are copied too
                for mine, its in zip((*args, *kwargs.values()), there, strict=True):
                    if mine is not its:
                        mine.copy_(its)
            return result

        return run


def _kernel_of(planners: Callable[[], dict[str, Any]]) -> Callable[[str], Callable[..., Any]]:
    """The operator by a backend's kernels, which must carry the call."""

    def operator(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in STEPS:
                args, kwargs = STEPS[name](*args, **kwargs), {}
            kernel = planners()[name](args) if name in STEPS else planners()[name](*args, **kwargs)
            assert kernel is not None, "the backend does not carry this"
            return kernel(*args, **kwargs)

        return run

    return operator


def _on_gpu(operator: Callable[[str], Callable[..., Any]], name: str) -> list[Any]:
    if not torch.cuda.is_available() or INTERPRETED:
        return []
    return [pytest.param(Implementation(operator, "cuda"), id=name, marks=pytest.mark.gpu)]


def _emulated() -> dict[str, Any]:
    launcher = cuda.make_launcher(cuda_emulation.module(), lambda index: True, lambda device: 0)
    return cpu.planners(launcher, "cpu", "cuda_")


def _in_use(name: str) -> Any:
    """A backward pass is an operator that no caller sees."""
    return getattr(torch.ops.cmai_fast if name.endswith("_backward") else ops, name)


_TRITON = _kernel_of(lambda: triton_kernels.KERNELS)
IN_USE = [pytest.param(Implementation(_in_use), id="in use"), *_on_gpu(_in_use, "in use on cuda")]
if INTERPRETED:
    KERNELS = [pytest.param(Implementation(_TRITON), id="triton")]
    IMPLEMENTATIONS = KERNELS
else:
    KERNELS = [
        pytest.param(Implementation(_kernel_of(lambda: cpu.KERNELS)), id="cpu"),
        pytest.param(Implementation(_kernel_of(_emulated)), id="cuda, emulated"),
        *_on_gpu(_kernel_of(lambda: cuda.KERNELS), "cuda"),
        *_on_gpu(_TRITON, "triton"),
    ]
    REFERENCE = pytest.param(Implementation(lambda name: getattr(reference, name)), id="reference")
    IMPLEMENTATIONS = [*IN_USE, REFERENCE, *KERNELS]
