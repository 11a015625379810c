"""The description of an attack, and the registry of attacks. Imports no PyTorch, so that names are checked early."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cmai_fast.registry import Registry
from cmai_fast.settings import described, kinds_of, typed

if TYPE_CHECKING:
    from torch import Tensor

    from cmai_fast.attacks.gradients import Gradient
    from cmai_fast.attacks.losses import Loss
    from cmai_fast.attacks.state import AttackResult
    from cmai_fast.attacks.victim import Victim
    from cmai_fast.threat import ThreatModel

# Every attack takes these; further keyword arguments of its function are its own settings.
_SHARED = ("steps", "restarts", "seed", "sample_ids", "loss", "gradient")
_BY_NAME = ("loss", "gradient")  # may be given by name among the settings


@dataclass(frozen=True)
class Attack:
    """An attack on the image, found in `ATTACKS` by name, and called with a victim.

    Attributes:
        name: as in `--attack`.
        label: its name in reports.
        steps, restarts: the default budget.
        least: the smallest number of steps.
        single: the budget is fixed.
        guard: it attacks a model with its guard, and needs one.
        threats: norms of the balls it searches.
        settings: its own settings, with their defaults.
        kinds: the types that each of these takes.
        named: which of `loss` and `gradient` it takes; an attack without gradients may take a loss alone.
        text: it changes prompts or captions, and needs the victim's.
        aimed: it needs a target.
        unbounded: it changes the uploaded picture as it likes; the ball is the whole box.
        refuse: raises ValueError for values of its own settings that it does not take; called with those given.
        fit: finds what all images have in common (`Victim.common`), on other samples; None: it attacks each by itself.
        run: the function itself.
    """

    name: str
    label: str
    steps: int
    restarts: int
    least: int
    single: bool
    guard: bool
    threats: tuple[str, ...]
    settings: Mapping[str, Any]
    kinds: Mapping[str, tuple[type, ...]]
    named: tuple[str, ...]
    text: bool
    aimed: bool
    unbounded: bool
    refuse: Callable[..., None] | None
    fit: Callable[..., Tensor] | None
    run: Callable[..., AttackResult]

    @property
    def queries(self) -> bool:
        """Whether it searches images by queries alone, for the highest loss."""
        return self.named == ("loss",) and not (self.text or self.unbounded) and self.fit is None

    @property
    def losses(self) -> bool:
        """Whether it maximises a loss that can be chosen."""
        return "loss" in self.named

    def __call__(
        self,
        victim: Victim,
        clean: Tensor,
        threat: ThreatModel,
        *,
        steps: int | None = None,
        restarts: int | None = None,
        seed: int = 0,
        sample_ids: Tensor | None = None,
        loss: str | Loss | None = None,
        gradient: str | Gradient | None = None,
        **settings: Any,
    ) -> AttackResult:
        """Adversarial images for the batch of `victim`.

        Args:
            victim: the batch and its model, which is restored afterwards; no global random state is read or changed.
            clean: (N, C, H, W) pixels in [0, 1], or what `victim.pixels` gives.
            threat: the ball.
            steps, restarts: None takes the default. The best result of each sample over the restarts is kept.
            seed: of random starts. A sample's start depends on (seed, restart, sample id) only.
            sample_ids: (N,) int64; None: the index in the batch.
            loss: what is maximised, by name or as a function (`cmai_fast.attacks.losses`); None: the task's
                cross-entropy.
            gradient: how it is differentiated, by name or as an object (`cmai_fast.attacks.gradients`); None: exactly.
            settings: the attack's own.

        Raises:
            ValueError: a setting, budget, norm or batch that the attack does not take.
        """
        steps = self.steps if steps is None else steps
        restarts = self.restarts if restarts is None else restarts
        self.check(threat.norm, steps, restarts)
        self.check_surface(threat)
        own = self.read(
            {**settings, **({"loss": loss} if loss else {}), **({"gradient": gradient} if gradient else {})}
        )
        return self.run(victim, clean, threat, steps=steps, restarts=restarts, seed=seed, sample_ids=sample_ids, **own)

    def check(self, norm: str, steps: int, restarts: int) -> None:
        """Raises ValueError for a budget or norm that the attack does not take; needs no model."""
        if norm not in self.threats:
            raise ValueError(f"{self.name} does not support the norm {norm!r}; expected {' or '.join(self.threats)}")
        if self.single and (steps, restarts) != (self.steps, self.restarts):
            raise ValueError(
                f"{self.name} takes one step from the clean image; steps is {steps} and restarts is {restarts}. Use "
                "pgd for more"
            )
        if self.fit is not None and restarts != 1:
            raise ValueError(
                f"{self.name} finds one perturbation for all samples; restarts is {restarts}, expected 1 (try other "
                "seeds)"
            )
        if steps < self.least or restarts < 1:
            raise ValueError(
                f"{self.name}: steps is {steps} and restarts is {restarts}; expected at least {self.least} and at "
                "least 1"
            )

    def check_surface(self, threat: ThreatModel) -> None:
        """Raises ValueError if the attack has no bound and the threat model has one, or is not of uploads."""
        if self.unbounded and not (threat.surface.name == "upload" and threat.norm == "linf" and threat.eps == 1):
            raise ValueError(
                f"{self.name} changes the uploaded picture without a bound, and the threat is {threat.surface} with "
                f"{threat.norm} eps {threat.eps:.4g}; expected upload with linf eps 1 (--threat upload --eps 1)"
            )

    def read(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The attack's own settings (and `loss` and `gradient`, by name), converted to their types from values or text.

        Raises:
            ValueError: an unknown setting, or a value that cannot be read (the message lists the settings) or that the
                attack does not take.
        """
        found: dict[str, Any] = {}
        for key, value in settings.items():
            if key in self.named:
                _check_named(key, value)
                found[key] = value
            elif key not in self.settings:
                raise ValueError(f"{self.name} has no setting {key!r}; {self._listed()}")
            else:
                found[key] = self._typed(key, value)
        if self.refuse is not None:
            self.refuse(**{key: found[key] for key in found if key in self.settings})
        return found

    def describe(self) -> dict[str, str]:
        """The types and default of each own setting, as text."""
        return {key: described(self.kinds[key], default) for key, default in self.settings.items()}

    def _listed(self) -> str:
        own = [f"{key} ({said})" for key, said in self.describe().items()]
        own += [f"{key} (a name)" for key in self.named]
        return f"its settings are {', '.join(own)}" if own else "it has no settings of its own"

    def _typed(self, key: str, value: Any) -> Any:
        try:
            return typed(value, self.kinds[key])
        except ValueError:
            raise ValueError(f"{self.name}: {key} is {value!r}; {self._listed()}") from None


ATTACKS: Registry[Attack] = Registry(
    "attack",
    "cmai_fast.attacks",
    frozenset(
        "ascent attack canvas captions deployed gradients joint losses others prompts restarts state substitution "
        "unbounded upload victim words".split()
    ),
)


def attack(
    name: str,
    *,
    label: str,
    steps: int,
    restarts: int = 1,
    least: int = 1,
    single: bool = False,
    guard: bool = False,
    text: bool = False,
    aimed: bool = False,
    unbounded: bool = False,
    threats: Sequence[str] = ("linf", "l2"),
    refuse: Callable[..., None] | None = None,
    fit: Callable[..., Tensor] | None = None,
) -> Callable[[Callable[..., AttackResult]], Attack]:
    """Registers a function `(victim, clean, threat, *, steps, restarts, seed, sample_ids, ...)` as an attack.

    Further keyword arguments are the attack's own settings: each has a default and an annotation of `bool`, `int`,
    `float` or `str`, optionally with `None`. A gradient attack also takes `loss` and `gradient`, another one may take
    `loss` alone. `text`: it changes prompts or captions and needs `Victim.prompts`; its result holds them. `unbounded`:
    it changes uploaded pictures as it likes, and refuses a threat model with a bound. `refuse` gets the settings that
    are given, by keyword, and raises ValueError for bad values: before a model is loaded. `fit(batches, threat, *,
    steps, seed, ...)` makes it universal: with the same settings, on batches of other samples, each a list of victims
    with the same images, it gives `Victim.common`. `aimed`: it needs a target.
    """

    def register(function: Callable[..., AttackResult]) -> Attack:
        taken = inspect.signature(function).parameters
        missing = [key for key in _SHARED[:4] if key not in taken]
        if missing:
            raise TypeError(f"attack {name!r} does not take {', '.join(missing)}; every attack takes these")
        own = [p for p in taken.values() if p.kind is p.KEYWORD_ONLY and p.name not in _SHARED]
        if bare := [p.name for p in own if p.default is p.empty]:
            raise TypeError(f"attack {name!r} has settings without a default: {', '.join(bare)}")
        made = Attack(
            name=name,
            label=label,
            steps=steps,
            restarts=restarts,
            least=least,
            single=single,
            guard=guard,
            threats=tuple(threats),
            settings={p.name: p.default for p in own},
            kinds={p.name: kinds_of(p.annotation, function.__globals__, "an attack") for p in own},
            named=tuple(key for key in _BY_NAME if key in taken),
            text=text,
            aimed=aimed,
            unbounded=unbounded,
            refuse=refuse,
            fit=fit,
            run=function,
        )
        return ATTACKS.add(name, made)

    return register


def _check_named(key: str, value: Any) -> None:
    if isinstance(value, str):
        from cmai_fast.attacks import gradients, losses

        (losses.LOSSES if key == "loss" else gradients.GRADIENTS).check(value)
