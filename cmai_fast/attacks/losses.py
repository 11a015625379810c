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
from cmai_fast.bridge.backward import differentiate, unit
from cmai_fast.registry import Registry


class Loss(Protocol):
    def __call__(self, features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None, /) -> Tensor:
        """(n,), higher where the attack is closer to its goal."""
        ...


_NO_TARGET = -100  # as in `Bridge.fuse`
_TINY = 1e-12  # in place of a difference of 0

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
    """L_task: the mean cross-entropy over the tokens of the true response; of a wanted response, its negative."""
    return -outputs.losses if victim.targeted else outputs.losses


@loss("margin")
def margin(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
    """max over target tokens t of (max over other tokens j of log p_j - log p_t): above 0 if the response breaks.

    The response is intact while each of its tokens beats all others, so the token with the smallest lead counts.
    Differences of log-probabilities are differences of logits. The loss of Carlini and Wagner (2017, section V.A, f_6),
    per token; it does not saturate where the model is sure of its answer. Of a wanted response (`Victim.targeted`) it
    is the negative: above 0 if the model gives it. Towards one other answer (`OtherAnswers.aim`) it is log p of that
    answer less that of the true one, at the token where the two part.
    """
    if not victim.targeted and victim.others is not None and victim.others.aim is not None:
        return victim.others.toward(victim.others.leads(outputs, rows), rows)
    logits, targets = outputs.logits, outputs.targets
    if logits.shape[-1] < 2:
        raise ValueError("the margin compares the target with other tokens, but there is only one to choose from")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    here = targets != _NO_TARGET
    place = targets.masked_fill(~here, 0).unsqueeze(-1)
    own = logits.gather(-1, place).squeeze(-1)
    other = logits.scatter(-1, place, float("-inf")).amax(-1)
    lead = (other - own).masked_fill(~here, float("-inf")).amax(1)
    return -lead if victim.targeted else lead


@loss("dlr")
def dlr(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
    """The difference of logits ratio over the answers to choose from (Croce and Hein, 2020, equations 6 and 7).

    z_1 >= z_2 >= ... are the answers' log-probabilities where they part from the label, y is the true answer, and j
    any other: (max z_j - z_y) / (z_1 - z_3), above 0 if the response breaks. Towards one answer t (`OtherAnswers.aim`,
    or the wanted response): (z_t - z_y) / (z_1 - (z_3 + z_4) / 2). The cross-entropy of a sure model saturates; a ratio
    does not.

    Raises:
        ValueError: the victim's `others` are missing, or a sample has fewer than four answers.
    """
    others = victim.others
    if others is None:
        raise ValueError(
            "dlr compares the answers to choose from, which the victim does not know; set its `others`, or use margin"
        )
    if others.least < 3:
        raise ValueError(
            f"row {int(others.counts.argmin())} has {others.least + 1} answers to choose from, and dlr compares "
            "at least 4; use margin"
        )
    leads = others.leads(outputs, rows)
    z = torch.cat([torch.zeros_like(leads[:, :1]), leads], 1).topk(4, 1).values
    if others.aim is None:
        return leads.amax(1) / (z[:, 0] - z[:, 2] + _TINY)
    toward = others.toward(leads, rows) / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + _TINY)
    return -toward if victim.targeted else toward


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


BALANCES = ("direction", "none")


@dataclass(frozen=True)
class Weighted:
    """alpha * L - beta * S_c, L being any loss.

    The two gradients meet at the bridge, p = dL/dh_v and q = dS_c/dh_v, and their sizes have nothing to do with each
    other: p is 1e-5 of its size where the model is sure of its answer, q is small where features are large. So an
    attack ascends alpha * p/|p| - beta * q/|q| there, per sample, whatever the gradient estimator: beta is the share of
    consistency in a step. In `easyvqa-llava` the raw sum moves 0.01% of a step's signs at beta 0.1, R = 0, and 50% with
    exact gradients. The value of the loss is the weighted sum.

    Args:
        balance: `direction`, or `none` for the gradient of the sum itself.
    """

    alpha: float = 1.0
    beta: float = 0.0
    loss: Loss = cross_entropy
    balance: str = "direction"

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise ValueError(f"balance is {self.balance!r}; expected one of {', '.join(BALANCES)}")

    def __call__(self, features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        """(n,), differentiable."""
        if self.beta and not victim.scores:
            raise ValueError(f"beta is {self.beta}, but there are no consistency heads; give heads or set beta to 0")
        task = self.loss(features, outputs, victim, rows)
        if not self.beta:
            return self.alpha * task
        if self.balance == "none" or not (torch.is_grad_enabled() and features.requires_grad):
            return self.alpha * task - self.beta * victim.score(features, rows)
        p = self.alpha * differentiate(victim.bridge.model, task, features)
        way, score = self.direction(p, features, victim, rows)
        assert score is not None
        along = (way * features).flatten(1).sum(1)
        return (self.alpha * task - self.beta * score).detach() + along - along.detach()

    def direction(
        self, p: Tensor, features: Tensor, victim: Victim, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The direction of ascent at h_v (n, T, D) for p = d(alpha * L)/d h_v (n, T, D), and S_c (n,); detached.

        `features` has its graph, which stays.
        """
        if not self.beta:
            return p.detach(), None
        at = features.detach().requires_grad_()
        score = victim.score(at, rows)
        (q,) = torch.autograd.grad(score.sum(), at)
        way = self.alpha * unit(p) - self.beta * unit(q) if self.balance == "direction" else p - self.beta * q
        return way.detach(), score.detach()


def weighted(alpha: float = 1.0, beta: float = 0.0, loss: Loss = cross_entropy, balance: str = "direction") -> Weighted:
    """The inner problem of MBAT: alpha * L_task - beta * S_c."""
    return Weighted(alpha, beta, loss, balance)
