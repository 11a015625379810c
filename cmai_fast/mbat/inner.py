"""The inner problem of MBAT: max over delta in the ball of alpha * L_task - beta * S_c, by solvers of different price.

| solver | model passes for K steps |
|---|---|
| `pgd` | K full |
| `bridge` | R full + (K - R) of the vision side alone |
| `fgsm` | 1 full |

`bridge` freezes p = d(alpha * L_task)/d h_v, the co-state at the bridge, and ascends <p, h_v(x + delta)> through E_v,
whose gradient is exact: only the language model is linearised. S_c lives on the vision side and stays exact. Between
refreshes p counts by its direction alone, so that beta weighs the same against a sample that the model is sure of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks import Objective, Passes
from cmai_fast.attacks.pgd import step_sizes
from cmai_fast.attacks.state import geometry, prepare, random_start
from cmai_fast.threat import ThreatModel

SOLVERS = ("pgd", "bridge", "fgsm")


@dataclass
class InnerResult:
    """`adv` (N, C, H, W) in [0, 1]; `passes` of the model; `staleness`: cos(p used, p fresh) (N,) per refresh;
    `nonfinite` (N,) int64: NaN and infinite elements in a sample's gradients, as in `AttackResult`."""

    adv: Tensor
    passes: Passes
    staleness: list[Tensor]
    nonfinite: Tensor


def refresh_steps(steps: int, refreshes: int) -> set[int]:
    """Where p is made anew: R points that cut K steps into R + 1 equal parts, so R = K renews it at every step."""
    if not 0 <= refreshes <= steps:
        raise ValueError(f"refreshes is {refreshes}; expected 0 to {steps}, the number of inner steps")
    return {i * steps // (refreshes + 1) for i in range(1, refreshes + 1)} if refreshes < steps else set(range(steps))


def maximise(
    objective: Objective,
    clean: Tensor,
    threat: ThreatModel,
    solver: str,
    *,
    steps: int = 10,
    step_size: float | None = None,
    refreshes: int = 0,
    bridge_gradient: Tensor | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
) -> InnerResult:
    """Adversarial images for a training batch.

    Args:
        objective: alpha * L_task - beta * S_c of the batch.
        clean: (N, C, H, W) pixels in [0, 1], or what `objective.pixels` gives.
        threat: the ball.
        solver: `pgd` (exact), `bridge`, or `fgsm` (one step from a random start, Wong et al. 2020).
        steps: K.
        step_size: of every step, in the [0, 1] pixel range; None: falling linearly from 2 * eps towards 0, as in
            `attacks.pgd` (on a half-trained `easyvqa-llava` at 16/255, 256 questions, a mean loss of 0.210 after 10
            steps and 0.185 after 4; 2.5 * eps / K, of Madry et al., 0.189 and 0.180); for `fgsm` 1.25 * eps.
        refreshes: R of `bridge`; R = K is `pgd` exactly.
        bridge_gradient: p (N, T, D) of each sample at its clean image, free from the clean branch's own backward pass;
            None: `bridge` computes it at the start, for one full pass more (unless step 0 renews it anyway).
        seed, sample_ids: of the random start, as in `attacks.pgd`.

    The model is given back as it was, also after an exception.
    """
    if solver not in SOLVERS:
        raise ValueError(f"inner is {solver!r}; expected one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"inner steps is {steps}; expected at least 1")
    if solver == "fgsm":
        steps, step_size = 1, 1.25 * threat.eps if step_size is None else step_size
    renew = refresh_steps(steps, refreshes) if solver == "bridge" else set(range(steps))
    sizes = step_sizes(threat.eps, steps, step_size)
    outer_passes, objective.passes = objective.passes, Passes()
    try:
        with objective.lent():
            clean, eps, sample_ids = prepare(objective, clean, threat, sample_ids)
            p = None if bridge_gradient is None else objective.alpha * bridge_gradient.detach()
            if p is None and 0 not in renew:
                p, _ = _refresh(objective, objective.space.to_model(clean))
            adv, staleness, nonfinite = _ascend(objective, clean, threat, eps, sizes, renew, p, seed, sample_ids)
            return InnerResult(adv, objective.passes, staleness, nonfinite)
    finally:
        objective.passes = outer_passes + objective.passes


def _ascend(
    objective: Objective,
    clean: Tensor,
    threat: ThreatModel,
    eps: Tensor,
    sizes: list[float],
    renew: set[int],
    p: Tensor | None,
    seed: int,
    sample_ids: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor]:
    step = ops.pgd_linf_step_ if threat.norm == "linf" else ops.pgd_l2_step_
    space = geometry(objective, clean)
    adv, staleness, nonfinite = torch.empty_like(clean), [], torch.zeros_like(sample_ids)
    random_start(objective, adv, clean, eps, sample_ids, torch.arange(len(clean)), seed, threat.norm)
    model_input = objective.space.to_model(adv)
    for k, size in enumerate(sizes):
        if k in renew:
            fresh, grad = _refresh(objective, model_input)
            if p is not None:
                staleness.append(torch.cosine_similarity(p.flatten(1), fresh.flatten(1)))
            p = fresh
        else:
            assert p is not None
            grad = _vision_gradient(objective, model_input, p)
        step(
            adv, grad, clean, eps, torch.full_like(eps, size), model_input=model_input, nonfinite=nonfinite,
            **space,
        )  # fmt: skip
    return adv, staleness, nonfinite


def _refresh(objective: Objective, model_input: Tensor) -> tuple[Tensor, Tensor]:
    """A full pass at `model_input`: p = d(alpha * L_task)/d h_v, and the exact gradient at the pixels."""
    leaf = model_input.detach().clone().requires_grad_()
    features = objective.encode(leaf)
    losses, _ = objective.bridge.losses(features, **objective.batch)
    # Stops at the bridge, so the graph of the vision side stays for the second half.
    (p,) = torch.autograd.grad(objective.alpha * losses.sum(), features)
    objective.passes.full_forward += 1
    objective.passes.full_backward += 1
    return p, _pull_back(objective, features, leaf, p)


def _vision_gradient(objective: Objective, model_input: Tensor, p: Tensor) -> Tensor:
    """d/dx of alpha * <p / ||p||, h_v(x)> - beta * S_c(x), through E_v alone; p, (N, T, D), by direction only.

    The gradient of the cross-entropy is that of the margin times the probability of a wrong answer: 1e-5 for a sample
    that the model is sure of. The exact gradient grows as the attack moves on, a frozen p stays, and any beta would
    drown it. The scale of p says how sure the model was, not where to go.
    """
    norm = p.flatten(1).norm(dim=1).view(-1, *[1] * (p.dim() - 1))
    p = objective.alpha * p / norm.clamp_min(torch.finfo(p.dtype).tiny)
    leaf = model_input.detach().clone().requires_grad_()
    features = objective.encode(leaf)
    objective.passes.vision_forward += 1
    objective.passes.vision_backward += 1
    return _pull_back(objective, features, leaf, p)


def _pull_back(objective: Objective, features: Tensor, leaf: Tensor, p: Tensor) -> Tensor:
    target = (p * features).sum()
    if objective.beta:
        target = target - objective.beta * objective.score(features).sum()
    return torch.autograd.grad(target, leaf)[0]
