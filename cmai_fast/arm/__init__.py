"""Adaptive robustness: the schedule of beta in training, the guard in use."""

from cmai_fast.arm.guard import Decision, Guard
from cmai_fast.arm.schedule import ARMSchedule

__all__ = ["ARMSchedule", "Decision", "Guard"]
