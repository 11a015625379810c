"""The inner problem of MBAT: max over delta in the ball of alpha * L_task - beta * S_c, by solvers of different cost.

| solver | model passes for K steps |
|---|---|
| `pgd` | K full |
| `bridge` | R full + (K - R) of the vision side alone |
| `fgsm` | 1 full |

`bridge` freezes p = d(alpha * L_task)/d h_v, the co-state at the bridge, and maximises <p, h_v(x + delta)> through E_v,
whose gradient is exact: only the language model is linearised. S_c depends on the vision side only and stays exact.
Words under attack (`Victim.words`) move at no pass of their own: their gradient comes with p, and the step along it has
a closed form. `reworded` attacks the words alone.
In every solver p and q = dS_c/d h_v are balanced where they meet (`cmai_fast.attacks.losses.Weighted`), so that beta
means the same for each of them, and for samples of which the model is sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast.attacks.ascent import Ascent, ascend, step_sizes
from cmai_fast.attacks.gradients import Course, Exact, Gradient, StaleBridge
from cmai_fast.attacks.gradients import refresh_steps as refresh_steps  # for checks of a solver's settings
from cmai_fast.attacks.losses import Loss, weighted
from cmai_fast.attacks.state import Tally, prepare
from cmai_fast.attacks.victim import Passes, Victim, attack_mode
from cmai_fast.attacks.words import Words
from cmai_fast.threat import ThreatModel

SOLVERS = ("pgd", "bridge", "fgsm")
_FGSM_STEP = 1.25  # of `fgsm`, in units of eps (Wong et al. 2020)


@dataclass
class InnerResult:
    """`adv` (N, C, H, W) in [0, 1], and `model_input`, the same in the model's input space; `passes` of the model;
    `staleness`: cos(stale p, fresh p) (N,) per refresh; `nonfinite` and `zero_gradients` (N,) int64: NaN and infinite
    elements in a sample's gradients, and the number of all-zero gradients, as in `AttackResult`."""

    adv: Tensor
    model_input: Tensor
    passes: Passes
    staleness: list[Tensor]
    nonfinite: Tensor
    zero_gradients: Tensor


def maximise(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    solver: str,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    balance: str = "direction",
    steps: int = 10,
    step_size: float | None = None,
    refreshes: int = 0,
    bridge_gradient: Tensor | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
) -> InnerResult:
    """Adversarial images for a training batch.

    Args:
        victim: the batch; beta != 0 needs its consistency heads.
        clean: (N, C, H, W) pixels in [0, 1], or what `victim.pixels` gives.
        threat: the ball.
        solver: `pgd` (exact), `bridge`, or `fgsm` (FGSM-RS: one step from a random start, Wong et al. 2020).
        alpha, beta, balance: weights of L_task and of S_c, and how their gradients are balanced; see `Weighted`.
        steps: K.
        step_size: of every step, in the [0, 1] pixel range; None: decreasing linearly from 2 * eps towards 0, as in
            `attacks.pgd` (on a half-trained `easyvqa-llava` at 16/255, 256 questions, a mean loss of 0.210 after 10
            steps and 0.185 after 4; 2.5 * eps / K, of Madry et al., 0.189 and 0.180); for `fgsm` 1.25 * eps.
        refreshes: R of `bridge`; R = K is `pgd` exactly.
        bridge_gradient: p (N, T, D) of each sample at its clean image, free from the clean branch's own backward pass;
            None: `bridge` computes it at the start with one more full pass (unless step 0 refreshes it anyway).
        seed, sample_ids: of the random start, as in `attacks.pgd`.

    The model is restored, also after an exception.
    """
    if solver not in SOLVERS:
        raise ValueError(f"inner is {solver!r}; expected one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"inner steps is {steps}; expected at least 1")
    staleness: list[Tensor] = []
    gradient: Gradient = StaleBridge(refreshes, bridge_gradient, staleness) if solver == "bridge" else Exact()
    loss, sizes = weighted(alpha, beta, balance=balance), inner_sizes(solver, threat.eps, steps, step_size)
    return climbed(victim, clean, threat, loss, gradient, sizes, seed, sample_ids, staleness)


def inner_sizes(solver: str, eps: float, steps: int, step_size: float | None) -> list[float]:
    """The size of each step of a solver, as of `maximise`."""
    if solver == "fgsm":
        steps, step_size = 1, _FGSM_STEP * eps if step_size is None else step_size
    return step_sizes(eps, steps, step_size)


def reworded(
    words: Words, features: Tensor, solver: str, *, steps: int = 10, refreshes: int = 0, early_stop: bool = False
) -> tuple[Tensor, Passes]:
    """Attacks the words of a batch alone: which samples were wrong on the way (N,) bool, and the passes.

    Args:
        features: h_v (N, T, D) of the images, which stay.
        solver, steps, refreshes: as of `maximise`. `bridge` starts from the gradient that the clean branch left, if it
            did, so that R = 0 costs nothing, else with one more pass; each refresh is a pass of the language side.
        early_stop: words of samples that are wrong stay as they are.

    The model is restored, also after an exception.
    """
    passes = {"pgd": steps, "fgsm": 1, "bridge": refreshes}[solver]
    if solver == "bridge" and bool(words.known.all()):
        words.climb(2.0)
    elif solver == "bridge" and refreshes < steps:
        passes += 1
    fooled = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    with attack_mode(words.bridge.model), torch.enable_grad():
        for k in range(passes):
            with words.said(alone=True):
                losses, right = words.bridge.losses(features.detach(), **words.texts)
            words.slope_of(losses)
            fooled |= ~right
            words.climb(2 * (1 - k / passes), (~fooled).nonzero().squeeze(1) if early_stop else None)
    return fooled, Passes(full_forward=passes, full_backward=passes)


def climbed(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    loss: Loss,
    gradient: Gradient,
    sizes: Sequence[float],
    seed: int,
    sample_ids: Tensor | None,
    staleness: Sequence[Tensor] = (),
) -> InnerResult:
    """The last iterate of an ascent of `loss` from a random start, with steps of these sizes; arguments as of
    `maximise`. The model is restored, also after an exception."""
    outer_passes, victim.passes = victim.passes, Passes()
    try:
        with victim.attack_mode():
            clean, eps, sample_ids = prepare(victim, clean, threat, sample_ids)
            estimate = gradient.start(Course(victim, loss, clean, sample_ids, len(sizes), seed))
            at, tally = Ascent.begin(victim, clean, eps, threat.norm, noise=(seed, sample_ids)), Tally(victim, clean)
            ascend(victim, at, estimate, sizes, threat.norm, tally)
            return InnerResult(
                at.adv, at.model_input, victim.passes, list(staleness), tally.nonfinite, tally.zero_gradients
            )
    finally:
        victim.passes = outer_passes + victim.passes
