"""What happens to an answer that scores below the threshold: one file per policy, found by name."""

from cmai_fast.arm.policies.policy import POLICIES, Case, Decision, Policy, policy

__all__ = ["POLICIES", "Case", "Decision", "Policy", "policy"]
