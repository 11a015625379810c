"""Attacks on the image, one file per attack, found by name in `ATTACKS`; names load when they are first used.

    result = ATTACKS["pgd"](Victim(bridge, space, batch), clean, ThreatModel("linf", 8 / 255), steps=10)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cmai_fast.attacks.attack import ATTACKS, Attack, attack

if TYPE_CHECKING:
    from cmai_fast.attacks.gradients import GRADIENTS, Exact, MeanOverTransforms, StaleBridge, exact_gradient
    from cmai_fast.attacks.losses import LOSSES, targeted, weighted
    from cmai_fast.attacks.state import AttackResult
    from cmai_fast.attacks.victim import Evaluation, Outputs, Passes, Victim

__all__ = [
    "ATTACKS",
    "GRADIENTS",
    "LOSSES",
    "Attack",
    "AttackResult",
    "Evaluation",
    "Exact",
    "MeanOverTransforms",
    "Outputs",
    "Passes",
    "StaleBridge",
    "Victim",
    "attack",
    "exact_gradient",
    "targeted",
    "weighted",
]

_HOMES = {
    "gradients": ("GRADIENTS", "Exact", "MeanOverTransforms", "StaleBridge", "exact_gradient"),
    "losses": ("LOSSES", "targeted", "weighted"),
    "state": ("AttackResult",),
    "victim": ("Evaluation", "Outputs", "Passes", "Victim"),
}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; a misspelt name of an attack should not wait for it.
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
