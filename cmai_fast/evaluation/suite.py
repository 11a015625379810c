"""An attack with its budget and settings, and the suite of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmai_fast.attacks import ATTACKS


@dataclass(frozen=True)
class AttackSpec:
    """An attack of `cmai_fast.attacks.ATTACKS` with its budget and settings.

    Args:
        name: as in `ATTACKS`.
        steps: None: the attack's default.
        restarts: independent restarts.
        settings: the attack's own keyword settings.
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

    @classmethod
    def parse(cls, text: str) -> AttackSpec:
        """From `NAME`, with its default budget, or `NAME:STEPS` or `NAME:STEPSxRESTARTS`.

        Raises:
            ValueError: an unknown name, or no such numbers.
        """
        name, colon, budget = text.partition(":")
        ATTACKS.check(name)
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", budget)
        if colon and found is None:
            raise ValueError(f"attack {text!r}: expected NAME, NAME:STEPS or NAME:STEPSxRESTARTS, such as {name}:100x3")
        if found is None:
            return cls(name, restarts=ATTACKS[name].restarts)
        return cls(name, int(found[1]), int(found[2] or 1))

    @property
    def label(self) -> str:
        """Its name in reports."""
        return ATTACKS[self.name].label

    @property
    def attacks_guard(self) -> bool:
        """Whether it needs a model with a guard."""
        return ATTACKS[self.name].guard

    @property
    def stops(self) -> bool:
        """Whether the attack stops at a sample whose answer has changed, and would go on if it had not."""
        return not (self.attacks_guard or ATTACKS[self.name].single)

    def check(self, norm: str) -> None:
        """Raises ValueError if the attack does not support this norm."""
        ATTACKS[self.name].check(norm, int(self.steps or 0), self.restarts)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "steps": self.steps, "restarts": self.restarts, "settings": dict(self.settings)}

    @property
    def key(self) -> str:
        """Its name in results: `pgd-50x2`, with its own settings if any."""
        own = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.name}-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "") + (own and f"[{own}]")

    @property
    def passes(self) -> int:
        """The approximate maximum of forward passes per sample, for progress."""
        return 3 * int(self.steps or 1) * self.restarts


def headline_suite(steps: int, restarts: int) -> list[AttackSpec]:
    """PGD, and APGD-CE with twice the steps, since PGD gets lost if the cross-entropy is flat."""
    return [AttackSpec("pgd", steps, restarts), AttackSpec("apgd", 2 * steps)]


def check_suite(suite: Sequence[AttackSpec]) -> None:
    """Raises ValueError if an attack is in the suite twice: its results would stand under one key."""
    keys = [spec.key for spec in suite]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the suite has {twice[0]} twice; expected each attack once")


def check_first(suite: Sequence[AttackSpec]) -> None:
    """Raises ValueError if the first attack of the suite changes prompts: its images are shown, and tried on other
    models."""
    if suite and ATTACKS[suite[0].name].text:
        raise ValueError(
            f"the suite begins with {suite[0].key}, which changes prompts; expected an attack on the image first, "
            "whose images are shown and tried on the other models"
        )


def curve_attack(suite: Sequence[AttackSpec]) -> AttackSpec:
    """PGD with fewer steps than the headline, since the curve over eps has many points. Results name it."""
    return AttackSpec("pgd", min(20, *(int(spec.steps or 1) for spec in suite[:1])) if suite else 20)
