"""What a gradient attack maximises: functions (features, outputs, victim, rows) -> (n,), found by name in `LOSSES`.

`features` is h_v (n, T, image_dim) of the current images, with its graph; `outputs` is the language side's output for
them (`cmai_fast.attacks.victim.Outputs`, computed on access); `rows` (n,) are the rows of the victim's batch that are
still under attack, None for all. Losses are per sample and never averaged over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cmai_fast.attacks.victim import Outputs, Victim
from cmai_fast.registry import Registry


class Loss(Protocol):
    def __call__(self, features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None, /) -> Tensor:
        """(n,), higher where the attack is closer to its goal."""
        ...


_NO_TARGET = -100  # as in `Bridge.fuse`

LOSSES: Registry[Loss] = Registry("loss", "cmai_fast.attacks.losses")


def loss(name: str) -> Callable[[Loss], Loss]:
    """Registers a loss under a name."""
    return lambda function: LOSSES.add(name, function)


def loss_of(named: str | Loss | None) -> Loss:
    """The loss of this name, the function itself, or the task's cross-entropy."""
    if named is None:
        return cross_entropy
    return LOSSES[named] if isinstance(named, str) else named


@loss("cross-entropy")
def cross_entropy(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
    """L_task: the mean cross-entropy over the tokens of the true response."""
    return outputs.losses


@loss("margin")
def margin(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
    """max over target tokens t of (max over other tokens j of log p_j - log p_t): above 0 if the response breaks.

    The response is intact while each of its tokens beats all others, so the token with the smallest lead counts.
    Differences of log-probabilities are differences of logits. The loss of Carlini and Wagner (2017, section V.A, f_6),
    per token; it does not saturate where the model is sure of its answer.
    """
    logits, targets = outputs.logits, outputs.targets
    if logits.shape[-1] < 2:
        raise ValueError("the margin compares the target with other tokens, but there is only one to choose from")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    here = targets != _NO_TARGET
    place = targets.masked_fill(~here, 0).unsqueeze(-1)
    own = logits.gather(-1, place).squeeze(-1)
    other = logits.scatter(-1, place, float("-inf")).amax(-1)
    return (other - own).masked_fill(~here, float("-inf")).amax(1)


@loss("lower-consistency")
def lower_consistency(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
    """-S_c: image and true response drift apart."""
    return -victim.score(features, rows)


@loss("raise-consistency")
def raise_consistency(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
    """S_c: the image looks consistent with the response, as an attacker who evades the verifier wants."""
    return victim.score(features, rows)


@loss("feature-distance")
def feature_distance(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
    """||h_v(x + delta) - h_v(x)||^2 from the batch's own images, which needs no labels (FARE, Schlarmann et al. 2024).

    Its gradient is 0 at the clean image itself: start at a random point.
    """
    return (features - victim.own_features(rows)).flatten(1).square().sum(1)


def targeted(texts: Mapping[str, Tensor]) -> Loss:
    """-L_task of the responses that the attacker wants, one per sample.

    `texts`: the victim's batch with these responses as labels (for a dual encoder, with these `labels`). `fooled` still
    means that the true response is broken; with `early_stop=False` an attack continues towards its target.
    """

    def towards(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        return -Outputs(victim, features, rows, victim.bridge.inputs(texts)[1]).losses

    return towards


@dataclass(frozen=True)
class Weighted:
    """alpha * L - beta * S_c, L being any loss; the `bridge` gradient keeps the second term exact."""

    alpha: float = 1.0
    beta: float = 0.0
    loss: Loss = cross_entropy

    def __call__(self, features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        if self.beta and victim.heads is None:
            raise ValueError(f"beta is {self.beta}, but there are no consistency heads; give heads or set beta to 0")
        found = self.alpha * self.loss(features, outputs, victim, rows)
        return found - self.beta * victim.score(features, rows) if self.beta else found


def weighted(alpha: float = 1.0, beta: float = 0.0, loss: Loss = cross_entropy) -> Weighted:
    """The inner problem of MBAT: alpha * L_task - beta * S_c."""
    return Weighted(alpha, beta, loss)
