"""Adaptive robustness: the schedule of beta, eps and lam in training, the guard in use. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmai_fast.lazy import lazily

if TYPE_CHECKING:
    from cmai_fast.arm.guard import Guard
    from cmai_fast.arm.policies import POLICIES, Case, Decision
    from cmai_fast.arm.schedule import ARMSchedule, Range

__all__ = ["POLICIES", "ARMSchedule", "Case", "Decision", "Guard", "Range"]

__getattr__ = lazily(
    __name__,
    {
        "ARMSchedule": "schedule",
        "Case": "policies",
        "Decision": "policies",
        "Guard": "guard",
        "POLICIES": "policies",
        "Range": "schedule",
    },
)
