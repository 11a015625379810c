"""An attack with its strength, and the suite that a model is measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmai_fast.attacks import ATTACKS


@dataclass(frozen=True)
class AttackSpec:
    """An attack of `cmai_fast.attacks.ATTACKS` with its strength.

    Args:
        name: as in `ATTACKS`.
        steps: None: the attack's own number.
        restarts: independent starts.
        settings: keyword settings of the attack's own.
    """

    name: str
    steps: int | None = None
    restarts: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        attack = ATTACKS[self.name]
        if self.steps is None:
            object.__setattr__(self, "steps", attack.steps)
        self.check(attack.threats[0])
        object.__setattr__(self, "settings", attack.read(self.settings))

    @property
    def label(self) -> str:
        """What reports call it."""
        return ATTACKS[self.name].label

    def check(self, norm: str) -> None:
        """Raises ValueError where the attack does not take balls of this norm."""
        ATTACKS[self.name].check(norm, int(self.steps or 0), self.restarts)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "steps": self.steps, "restarts": self.restarts, "settings": dict(self.settings)}

    @property
    def key(self) -> str:
        """What results call it: `pgd-50x2`; settings of its own are named."""
        own = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.name}-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "") + (own and f"[{own}]")

    @property
    def passes(self) -> int:
        """About how many forward passes per sample it costs at most: what progress is reckoned in."""
        return 3 * int(self.steps or 1) * self.restarts


def headline_suite(steps: int, restarts: int) -> list[AttackSpec]:
    """PGD, and APGD-CE of twice the steps: where the cross-entropy is flat, PGD loses its way."""
    return [AttackSpec("pgd", steps, restarts), AttackSpec("apgd", 2 * steps)]


def curve_attack(suite: Sequence[AttackSpec]) -> AttackSpec:
    """Fewer steps than the headline: the curve over eps has many points, and says what it was made with."""
    return AttackSpec("pgd", min(20, *(int(spec.steps or 1) for spec in suite[:1])) if suite else 20)
