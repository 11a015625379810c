"""ARM in training: adapts beta to the consistency score of adversarial batches."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_STATE = ("beta", "mean", "variance", "rising", "held", "count", "mean_sum", "variance_sum")


class ARMSchedule:
    """Raises beta while S_c of adversarial batches is low, and always returns it to its base.

    The proposal's rule (beta <- min(beta + step, beta_max) while avg(S_c) < tau_c) reinforces itself: a higher beta
    makes the attack push S_c down, which raises beta again, so it stays at beta_max although S_c would be high enough
    at the initial beta. Here beta goes through a cycle:

    - **rest**: beta is at its base. Once the averages have seen enough batches *at this beta* (about
      1 / (1 - momentum)), a mean below `tau_train` or a variance above `variance_max` starts a rise.
    - **rise**: one `beta_step` per update, up to `beta_max`, held there for `hold` further updates. It ends early when
      the mean is back at `tau_train + hysteresis` and the variance in bounds.
    - **decay**: the distance to the base shrinks by the factor `decay` per update, regardless of S_c; at the base (last
      5% of the range) the averages are reset. So only S_c as measured at the base can start the next rise.

    Args:
        tau_train: S_c below which an adversarial batch counts as inconsistent, in [-1, 1].
        beta: base value, where it starts and returns to.
        beta_max: never exceeded; at least `beta`.
        beta_step: rise in one update, above 0.
        decay: in [0, 1).
        momentum: of the exponential averages, in [0, 1).
        hysteresis: how far above tau_train the mean must be to end a rise early, at least 0.
        hold: further updates spent at beta_max before it decays, at least 0.
        variance_max: of S_c within a batch; by default the variance is only recorded.

    Attributes:
        beta: the weight to use for the next batch, always in [base, beta_max].
        mean, variance: bias-corrected exponential averages over batches; None before the first update.
    """

    def __init__(
        self,
        tau_train: float,
        beta: float,
        beta_max: float,
        beta_step: float,
        decay: float = 0.95,
        momentum: float = 0.9,
        hysteresis: float = 0.05,
        hold: int = 50,
        variance_max: float = math.inf,
    ) -> None:
        requirements = {
            f"tau_train is {tau_train}; expected a value of S_c, -1 <= tau_train <= 1": -1 <= tau_train <= 1,
            f"beta is {beta}, beta_max {beta_max}; expected 0 <= beta <= beta_max": 0 <= beta <= beta_max < math.inf,
            f"beta_step is {beta_step}; expected above 0, finite": 0 < beta_step < math.inf,
            f"decay is {decay}; expected 0 <= decay < 1": 0 <= decay < 1,
            f"momentum is {momentum}; expected 0 <= momentum < 1": 0 <= momentum < 1,
            f"hysteresis is {hysteresis}; expected at least 0": 0 <= hysteresis < math.inf,
            f"hold is {hold}; expected at least 0 updates": hold >= 0,
            f"variance_max is {variance_max}; expected above 0": variance_max > 0,
        }
        for message, met in requirements.items():
            if not met:
                raise ValueError(message)
        self.tau_train, self.base, self.beta_max, self.beta_step = tau_train, float(beta), float(beta_max), beta_step
        self.decay, self.momentum, self.hysteresis = decay, momentum, hysteresis
        self.hold, self.variance_max = hold, variance_max
        self.beta = self.base
        self.mean: float | None = None
        self.variance: float | None = None
        self.rising = False
        self.held = 0
        self.count, self.mean_sum, self.variance_sum = 0, 0.0, 0.0

    def follow(self, tau_train: float, beta: float, beta_max: float, beta_step: float) -> None:
        """Takes over settings that were changed. A beta at rest moves to the new base, a raised one into the range.

        Raises:
            ValueError: values that the constructor refuses.
        """
        if (tau_train, beta, beta_max, beta_step) == (self.tau_train, self.base, self.beta_max, self.beta_step):
            return
        at_rest = self.beta == self.base
        checked = ARMSchedule(tau_train, beta, beta_max, beta_step)
        self.tau_train, self.base, self.beta_max, self.beta_step = tau_train, checked.base, checked.beta_max, beta_step
        self.beta = self.base if at_rest else min(max(self.beta, self.base), self.beta_max)

    def update(self, s_c: Tensor) -> None:
        """Takes S_c (N,) of one adversarial batch, made with the current beta, and sets beta for the next.

        Raises:
            ValueError: an empty batch, or NaN or infinite scores; the state is then unchanged.
        """
        mean, variance = self._average(s_c)
        if self.rising:
            self.held += self.beta >= self.beta_max
            recovered = mean >= self.tau_train + self.hysteresis and variance <= self.variance_max
            self.rising = not recovered and self.held <= self.hold
        elif self.beta == self.base and self.count >= round(1 / (1 - self.momentum)):
            self.rising = mean < self.tau_train or variance > self.variance_max
            self.held = 0
        if self.rising:
            self.beta = min(self.beta + self.beta_step, self.beta_max)
        elif self.beta > self.base:
            distance = (self.beta - self.base) * self.decay
            if distance > 0.05 * (self.beta_max - self.base):
                self.beta = self.base + distance
            else:
                self.beta = self.base
                self.count, self.mean_sum, self.variance_sum = 0, 0.0, 0.0

    def _average(self, s_c: Tensor) -> tuple[float, float]:
        scores = s_c.detach().double().flatten()
        finite = int(scores.isfinite().sum())
        if not len(scores) or finite < len(scores):
            raise ValueError(
                f"S_c of a batch of {len(scores)} with {len(scores) - finite} NaN or infinite; expected at least one, "
                "all finite. Look for a diverging loss or too large a learning rate"
            )
        self.count += 1
        keep = self.momentum
        self.mean_sum = keep * self.mean_sum + (1 - keep) * scores.mean().item()
        self.variance_sum = keep * self.variance_sum + (1 - keep) * scores.var(correction=0).item()
        seen = 1 - keep**self.count
        self.mean, self.variance = self.mean_sum / seen, self.variance_sum / seen
        return self.mean, self.variance

    def state_dict(self) -> dict[str, Any]:
        """The mutable state as plain numbers for JSON, without the constructor's settings."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict` of a schedule with the same settings.

        Raises:
            ValueError: keys missing or unknown, or a beta outside [base, beta_max] of this schedule.
        """
        if set(state) != set(_STATE):
            raise ValueError(f"ARM state with keys {sorted(state)}; expected {sorted(_STATE)}")
        if not self.base <= state["beta"] <= self.beta_max:
            raise ValueError(
                f"the saved beta {state['beta']} is outside [{self.base}, {self.beta_max}]; resume with the settings "
                "that the checkpoint was written with"
            )
        for name in _STATE:
            setattr(self, name, state[name])
