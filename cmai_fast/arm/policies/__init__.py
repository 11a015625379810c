"""Policies decide about answers that score below the threshold: one file per policy, found by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmai_fast.arm.policies.policy import POLICIES, Case, Decision, Policy, policy
from cmai_fast.lazy import lazily

if TYPE_CHECKING:
    from cmai_fast.arm.policies.certify import Certify
    from cmai_fast.arm.policies.ensemble import Ensemble
    from cmai_fast.arm.policies.purify import Purify
    from cmai_fast.arm.policies.review import Review
    from cmai_fast.arm.policies.robust_weights import RobustWeights
    from cmai_fast.arm.policies.smooth import Smooth

__all__ = [
    "POLICIES",
    "Case",
    "Certify",
    "Decision",
    "Ensemble",
    "Policy",
    "Purify",
    "Review",
    "RobustWeights",
    "Smooth",
    "policy",
]

__getattr__ = lazily(
    __name__,
    {
        "Certify": "certify",
        "Ensemble": "ensemble",
        "Purify": "purify",
        "Review": "review",
        "RobustWeights": "robust_weights",
        "Smooth": "smooth",
    },
)
