"""An attack with its budget and settings, and the suite of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmai_fast.attacks import ATTACKS
from cmai_fast.threat import ThreatModel


@dataclass(frozen=True)
class AttackSpec:
    """An attack of `cmai_fast.attacks.ATTACKS` with its budget and settings.

    Args:
        name: as in `ATTACKS`.
        steps: None: the attack's default.
        restarts: independent restarts.
        settings: the attack's own keyword settings, and `loss` and `gradient` by name.
        target: the text that the model has to give; None: any wrong answer will do. For a dual encoder, one of the
            texts that it chooses from. A universal attack takes several: `yes|no`.
        other: moves to one other answer of the sample's choices (or texts of a dual encoder), by its rank at the clean
            image, 0 being the likeliest; any wrong answer will do. Needs the loss `margin` or `dlr`.
        reference: moves away from one reference, by its frequency, 0 being the most frequent, in place of the model's
            own right answer. Takes all steps, since that is not what the model says.
        again: starts from the sample's worst image of the attacks before, and moves away from the reference that gave
            it.

    Samples for which there is no such answer are not attacked.

    Raises:
        ValueError: an unknown attack, a bad budget or setting, or an aim that the attack does not take.
    """

    name: str
    steps: int | None = None
    restarts: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    target: str | None = None
    other: int | None = None
    reference: int | None = None
    again: bool = False

    def __post_init__(self) -> None:
        attack = ATTACKS[self.name]
        if self.steps is None:
            object.__setattr__(self, "steps", attack.steps)
        attack.check(attack.threats[0], int(self.steps or 0), self.restarts)
        object.__setattr__(self, "settings", attack.read(self.settings))
        self._check_aim()

    def _check_aim(self) -> None:
        aims = self._aims()
        if ATTACKS[self.name].aimed and self.target is None:
            raise ValueError(
                f"{self.name} needs a target: the text that the model has to give, or several ('yes|no'); --target TEXT"
            )
        if not aims:
            return
        if not ATTACKS[self.name].losses:
            raise ValueError(f"{self.name} does not take {next(iter(aims))}: it has no loss that would be aimed")
        if len(aims) > 1:
            raise ValueError(f"{self.name}: {' and '.join(aims)} are given; expected one of them")
        if not all(text.strip() for text in self.targets):
            raise ValueError("target is empty; expected the text that the model has to give")
        if self.other is not None and self.settings.get("loss") not in ("margin", "dlr"):
            raise ValueError(
                f"{self.name}: other is {self.other}, and the loss {self.settings.get('loss', 'cross-entropy')} knows "
                "no other answers; set the loss to margin or dlr"
            )

    def _aims(self) -> dict[str, Any]:
        named = {"target": self.target, "other": self.other, "reference": self.reference, "again": self.again or None}
        return {name: value for name, value in named.items() if value is not None}

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
    def targets(self) -> tuple[str, ...]:
        """The texts of `target`, of which one has to be given."""
        if self.target is None:
            return ()
        return (self.target,) if ATTACKS[self.name].fit is None else tuple(self.target.split("|"))

    @property
    def attacks_guard(self) -> bool:
        """Whether it needs a model with a guard."""
        return ATTACKS[self.name].guard

    @property
    def stops(self) -> bool:
        """Whether the attack stops at a sample whose answer has changed, and would go on if it had not."""
        attack = ATTACKS[self.name]
        return not (attack.guard or attack.single or attack.fit is not None or self.target is not None)

    def check(self, threat: ThreatModel) -> None:
        """Raises ValueError if the attack does not search this ball."""
        ATTACKS[self.name].check(threat.norm, int(self.steps or 0), self.restarts)
        ATTACKS[self.name].check_surface(threat)

    def to_dict(self) -> dict[str, Any]:
        budget = {"name": self.name, "steps": self.steps, "restarts": self.restarts}
        return budget | {"settings": dict(self.settings)} | self._aims()

    @property
    def key(self) -> str:
        """Its name in results: `pgd-50x2`, with its own settings and its aim if any."""
        own = ",".join(f"{k}={v}" for k, v in {**self.settings, **self._aims()}.items())
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
