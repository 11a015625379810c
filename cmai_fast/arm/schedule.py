"""ARM in training: moves settings of the attack while its images look inconsistent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Of clean S_c, measured on `easyvqa-llava` (undefended) and `easyvqa-llava-immune`, 8/255 and 16/255, bridge R = 0 and
# PGD, K = 10, beta 0 to 0.3: attacks lower the mean by 0.56 to 1.67 clean standard deviations, at most 0.07 after
# immunisation, and the variance is 1.8 to 5.5 times the clean one, at most 1.3 times after immunisation.
MARGIN = 0.5  # standard deviations
VARIANCE_RATIO = 1.5
_STEPS = 20  # updates from base to bound by default
_PARTS = ("count", "sum", "squares")  # of the state of an average


@dataclass(frozen=True)
class Range:
    """Where ARM moves a setting.

    Args:
        base: its value at rest.
        bound: never exceeded; None, or at most `base`: the setting is not moved.
        step: its rise per update; None: a twentieth of the range.

    Raises:
        ValueError: a number that is not finite, or a step that is not above 0.
    """

    base: float
    bound: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("base", self.base), ("bound", self.bound)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} of a range is {value}; expected a finite number")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step of a range is {self.step}; expected above 0, finite, or None")

    @property
    def room(self) -> float:
        """From base to bound, 0 if the setting is not moved."""
        return 0.0 if self.bound is None else max(0.0, self.bound - self.base)

    @property
    def updates(self) -> float:
        """From base to bound, at least 1 if the setting is moved."""
        if not self.room:
            return 0.0
        return _STEPS if self.step is None else max(1.0, self.room / self.step)


class ARMSchedule:
    """Raises settings (beta, eps, lam) while S_c of adversarial images is low, and always returns them to their bases.

    The proposal's rule (beta <- min(beta + step, beta_max) while avg(S_c) < tau_c) reinforces itself: a higher beta
    makes the attack push S_c down, which raises beta again, so it stays at beta_max although S_c would be high enough
    at the initial beta. So all settings follow one `level` in [0, 1], 0 at their bases and 1 at their bounds, which
    goes through a cycle:

    - **rest**: the level is 0. Once the averages have seen enough updates *at this level* (about 1 / (1 - momentum)), a
      mean below `tau_train` or a variance above `variance_max` starts a rise.
    - **rise**: by each setting's step per update, up to 1, held there for `hold` further updates. It ends early when
      the mean is well above `tau_train` again (by half of `MARGIN`) and the variance in bounds.
    - **decay**: the level shrinks by the factor `decay` per update, regardless of S_c; at 0.05 it becomes 0 and the
      averages are reset. So only S_c as measured at the bases can start the next rise.

    A setting is base + level * (bound - base), if all take as many updates to their bounds. One with larger steps is
    there sooner: the level is that of the slowest.

    What counts as low follows from clean S_c of the same samples, texts and heads, averaged in the same way: a mean
    more than half a clean standard deviation (`MARGIN`) below the clean mean, a variance above 1.5 times
    (`VARIANCE_RATIO`) the clean one. The scale of S_c depends on the heads and moves while they learn, so neither a
    constant nor a threshold from before training would keep its meaning.

    Args:
        ranges: by name, what is moved.
        tau_train: mean S_c below which adversarial images count as inconsistent, in [-1, 1]; None: from clean S_c.
        variance_max: of S_c between samples, above which they count as inconsistent, above 0; None: from clean S_c;
            1 is never exceeded.
        wait: updates before the first rise, for heads that have yet to learn.
        decay: in [0, 1).
        momentum: of the exponential averages, in [0, 1).
        hold: further updates spent at level 1 before it decays, at least 0.

    `ranges`, `tau_train`, `variance_max` and `wait` may be changed at any time by `follow`.

    Attributes:
        level: of the next update's images, in [0, 1].
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        tau_train: float | None = None,
        variance_max: float | None = None,
        wait: int = 0,
        decay: float = 0.95,
        momentum: float = 0.9,
        hold: int = 50,
    ) -> None:
        requirements = {
            f"decay is {decay}; expected 0 <= decay < 1": 0 <= decay < 1,
            f"momentum is {momentum}; expected 0 <= momentum < 1": 0 <= momentum < 1,
            f"hold is {hold}; expected at least 0 updates": hold >= 0,
        }
        for message, met in requirements.items():
            if not met:
                raise ValueError(message)
        self.follow(ranges, tau_train, variance_max, wait)
        self.decay, self.hold = decay, hold
        self.level, self.rising, self.held = 0.0, False, 0
        self._adversarial, self._clean = _Average(momentum), _Average(momentum)

    def follow(
        self,
        ranges: Mapping[str, Range],
        tau_train: float | None = None,
        variance_max: float | None = None,
        wait: int = 0,
    ) -> None:
        """Takes over settings that were changed; level and averages stay.

        Raises:
            ValueError: values that the constructor refuses; nothing is changed.
        """
        requirements = {
            f"tau_train is {tau_train}; expected a value of S_c in [-1, 1], or None": tau_train is None
            or -1 <= tau_train <= 1,
            f"variance_max is {variance_max}; expected above 0, or None": variance_max is None or variance_max > 0,
            f"wait is {wait}; expected at least 0 updates": wait >= 0,
        }
        for message, met in requirements.items():
            if not met:
                raise ValueError(message)
        self.ranges, self.wait = dict(ranges), wait
        self._tau_train, self._variance_max = tau_train, variance_max

    def value(self, name: str) -> float:
        """The setting of this name for the next batch, in [base, bound]."""
        of = self.ranges[name]
        if of.bound is None or not of.room or not self.level:
            return of.base
        share = self.level * self._slowest / of.updates
        return of.bound if share >= 1 else min(of.bound, of.base + share * of.room)

    @property
    def mean(self) -> float | None:
        """Of S_c of adversarial images since the last rest began; None before the first."""
        return self._adversarial.mean

    @property
    def variance(self) -> float | None:
        """Of S_c between adversarial samples since the last rest began; None before the first."""
        return self._adversarial.variance

    @property
    def tau_train(self) -> float | None:
        """The threshold of the mean; None while it is not measured."""
        if self._tau_train is not None:
            return self._tau_train
        return None if not self._measured else self._clean_mean - MARGIN * self._clean_std

    @property
    def variance_max(self) -> float | None:
        """The threshold of the variance; None while it is not measured."""
        if self._variance_max is not None:
            return self._variance_max
        return None if not self._measured else VARIANCE_RATIO * self._clean_std**2

    def update(self, adversarial: Tensor, clean: Tensor) -> None:
        """Takes S_c of the images of one optimiser step, made at the current level, and sets the level for the next.

        Args:
            adversarial, clean: (N,) each, of the same samples.

        Raises:
            ValueError: no scores, or NaN or infinite ones; the state is then unchanged.
        """
        scores, of_clean = _finite(adversarial, "adversarial"), _finite(clean, "clean")
        self._adversarial.add(scores)
        self._clean.add(of_clean)
        if self.rising:
            self.held += self.level >= 1
            self.rising = not self._recovered() and self.held <= self.hold
        elif not self.level and self._slowest and self._measured and self._adversarial.settled:
            self.rising, self.held = self._low(), 0
        if self.rising and self._slowest:
            risen = self.level + 1 / self._slowest
            self.level = risen if risen < 1 - 1e-9 else 1.0
        elif self.level:
            self.level *= self.decay
            if self.level <= 0.05:
                self.level = 0.0
                self._adversarial.reset()

    @property
    def _slowest(self) -> float:
        """Updates from level 0 to 1; 0 if nothing is moved."""
        return max((of.updates for of in self.ranges.values()), default=0.0)

    @property
    def _measured(self) -> bool:
        return self._clean.settled and self._clean.count >= self.wait

    @property
    def _clean_mean(self) -> float:
        return self._clean.mean or 0.0

    @property
    def _clean_std(self) -> float:
        return math.sqrt(self._clean.variance or 0.0)

    def _low(self) -> bool:
        assert self.mean is not None and self.variance is not None
        assert self.tau_train is not None and self.variance_max is not None
        return self.mean < self.tau_train or self.variance > self.variance_max

    def _recovered(self) -> bool:
        if self._low():
            return False
        assert self.mean is not None and self.tau_train is not None
        return self.mean >= self.tau_train + MARGIN / 2 * self._clean_std

    def state_dict(self) -> dict[str, Any]:
        """The mutable state as plain numbers for JSON, without the settings."""
        averages = {"adversarial": self._adversarial, "clean": self._clean}
        return {"level": self.level, "rising": self.rising, "held": self.held} | {
            f"{name}_{part}": getattr(average, part) for name, average in averages.items() for part in _PARTS
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`.

        Raises:
            ValueError: keys missing or unknown, or a level outside [0, 1].
        """
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(
                f"ARM state with keys {sorted(state)}; expected {sorted(expected)}. The checkpoint was saved by "
                "another version, or with ARM off: resume with arm=False, or start a new run from its model and heads"
            )
        if not 0 <= state["level"] <= 1:
            raise ValueError(f"the saved level of ARM is {state['level']}; expected 0 to 1: the checkpoint is damaged")
        self.level, self.rising, self.held = state["level"], state["rising"], state["held"]
        for name, average in (("adversarial", self._adversarial), ("clean", self._clean)):
            for part in _PARTS:
                setattr(average, part, state[f"{name}_{part}"])


class _Average:
    """Bias-corrected exponential averages of a score and its square, each update counting alike.

    The variance is that between samples, also across updates: within an update of one sample it would be 0.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.reset()

    def reset(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, scores: Tensor) -> None:
        keep = self.momentum
        self.count += 1
        self.sum = keep * self.sum + (1 - keep) * scores.mean().item()
        self.squares = keep * self.squares + (1 - keep) * scores.square().mean().item()

    @property
    def settled(self) -> bool:
        return self.count >= round(1 / (1 - self.momentum))

    @property
    def mean(self) -> float | None:
        return self.sum / (1 - self.momentum**self.count) if self.count else None

    @property
    def variance(self) -> float | None:
        if not self.count:
            return None
        seen = 1 - self.momentum**self.count
        return max(0.0, self.squares / seen - (self.sum / seen) ** 2)


def _finite(s_c: Tensor, of: str) -> Tensor:
    scores = s_c.detach().double().flatten()
    finite = int(scores.isfinite().sum())
    if not len(scores) or finite < len(scores):
        raise ValueError(
            f"S_c of {len(scores)} {of} images with {len(scores) - finite} NaN or infinite; expected at least one, all "
            "finite. Look for a diverging loss or too large a learning rate"
        )
    return scores
