"""Which kernels run: the environment variable `CMAI_FAST_BACKEND`, or the fastest backend that is there.

A backend need not carry every operator, dtype or layout; what it does not carry runs the reference.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from cmai_fast.ops import cpu, reference
from cmai_fast.ops.schema import CHECKS, LIBRARY, SCHEMAS

_READY = "ready"
_CPU_KERNELS: dict[str, Callable[..., Any]] = {
    "pgd_linf_step_": cpu.pgd_linf_step_,
    "pgd_l2_step_": cpu.pgd_l2_step_,
}


def backend_report() -> dict[str, str]:
    """Every backend's name with "ready", or with the reason why it cannot run here."""
    return {
        "reference": _READY,
        "cpu": cpu.unavailable() or _READY,
        "triton": "this build has no Triton kernels",
        "cuda": "this build has no CUDA kernels",
    }


@functools.cache
def chosen_backend() -> str:
    """The backend in use, read from `CMAI_FAST_BACKEND` at the first operator call and kept.

    Raises:
        RuntimeError: the variable names a backend that does not exist or cannot run.
    """
    report = backend_report()
    wanted = os.environ.get("CMAI_FAST_BACKEND")
    if wanted:
        if wanted not in report:
            raise RuntimeError(f"CMAI_FAST_BACKEND={wanted!r} is no backend; choose one of {', '.join(report)}")
        if report[wanted] != _READY:
            ready = ", ".join(name for name, state in report.items() if state == _READY)
            raise RuntimeError(
                f"CMAI_FAST_BACKEND={wanted} cannot be had: {report[wanted]}. Unset it, or choose one of: {ready}"
            )
        return wanted
    if report["cpu"] != _READY:
        warnings.warn(f"cmai_fast runs its slower reference operators: {report['cpu']}", RuntimeWarning, stacklevel=2)
        return "reference"
    return "cpu"


def _register(name: str) -> None:
    check, from_reference = CHECKS[name], getattr(reference, name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        fast = _CPU_KERNELS.get(name) if chosen_backend() == "cpu" else None
        # Gradients are `autograd.py`'s; in-place writes into leaves that require grad are right here, as in optimisers.
        with torch.no_grad():
            return (fast or from_reference)(*args, **kwargs)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


for _name in SCHEMAS:
    _register(_name)
