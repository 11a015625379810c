"""Adaptive robustness: the schedule of beta in training, the guard in use. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmai_fast.arm.guard import Guard
    from cmai_fast.arm.policies import POLICIES, Case, Decision
    from cmai_fast.arm.schedule import ARMSchedule

__all__ = ["POLICIES", "ARMSchedule", "Case", "Decision", "Guard"]

_HOMES = {
    "ARMSchedule": "schedule",
    "Case": "policies",
    "Decision": "policies",
    "Guard": "guard",
    "POLICIES": "policies",
}


def __getattr__(name: str) -> Any:
    # A command checks the names of policies before it loads PyTorch, which the guard needs.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
