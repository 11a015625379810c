"""Attacks on the image, one file per attack, found by name in `ATTACKS`; names load when they are first used.

result = ATTACKS["pgd"](Victim(bridge, space, batch), clean, ThreatModel("linf", 8 / 255), steps=10)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmai_fast.attacks.attack import ATTACKS, Attack, attack
from cmai_fast.lazy import lazily

if TYPE_CHECKING:
    from cmai_fast.attacks.gradients import GRADIENTS, Exact, MeanOverTransforms, StaleBridge, exact_gradient
    from cmai_fast.attacks.losses import LOSSES, targeted, weighted
    from cmai_fast.attacks.others import OtherAnswers
    from cmai_fast.attacks.state import AttackResult
    from cmai_fast.attacks.victim import Evaluation, Outputs, Passes, Victim
    from cmai_fast.attacks.words import Words

__all__ = [
    "ATTACKS",
    "GRADIENTS",
    "LOSSES",
    "Attack",
    "AttackResult",
    "Evaluation",
    "Exact",
    "MeanOverTransforms",
    "OtherAnswers",
    "Outputs",
    "Passes",
    "StaleBridge",
    "Victim",
    "Words",
    "attack",
    "exact_gradient",
    "targeted",
    "weighted",
]

__getattr__ = lazily(
    __name__,
    {
        "GRADIENTS": "gradients",
        "Exact": "gradients",
        "MeanOverTransforms": "gradients",
        "StaleBridge": "gradients",
        "exact_gradient": "gradients",
        "LOSSES": "losses",
        "targeted": "losses",
        "weighted": "losses",
        "OtherAnswers": "others",
        "AttackResult": "state",
        "Evaluation": "victim",
        "Outputs": "victim",
        "Passes": "victim",
        "Victim": "victim",
        "Words": "words",
    },
)
