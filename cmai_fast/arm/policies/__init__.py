"""Policies decide about answers that score below the threshold: one file per policy, found by name."""

from cmai_fast.arm.policies.policy import POLICIES, Case, Decision, Policy, policy

__all__ = ["POLICIES", "Case", "Decision", "Policy", "policy"]
