"""Withhold the answer."""

from __future__ import annotations

from cmai_fast.arm.policies.policy import Case, Decision, policy


@policy("reject", label="Withhold the answer")
def reject(case: Case) -> Decision:
    """Always decides. It brings back no answer, so it is the last policy of every chain."""
    return case.decision(None, "reject")
