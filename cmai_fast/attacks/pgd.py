"""Gradient ascent in a ball: FGSM (Goodfellow et al., 2015), PGD (Madry et al., 2018), MI-FGSM (Dong et al., 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.objective import Objective, Passes
from cmai_fast.attacks.state import AttackResult, Best, geometry, prepare, random_start
from cmai_fast.threat import ThreatModel


def pgd(
    objective: Objective,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    decay: float = 0.0,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """PGD-`steps` from a random point of the ball (Madry et al., 2018), untargeted.

    Args:
        objective: what is maximised.
        clean: (N, C, H, W) pixels in [0, 1], or what `objective.pixels` gives.
        threat: the ball.
        steps: gradient steps a restart; 0 tries the random start alone.
        step_size: of every step, in the [0, 1] pixel range; None: falling linearly from 2 * eps to 0. On
            `easyvqa-llava` at 16/255 (50 steps, 2 restarts, 128 questions) that left 22% of the answers standing,
            eps / 4 34%, and APGD-CE-100 21%.
        restarts: independent starts; the best result of each sample is kept.
        random_start: False starts at the clean image.
        decay: momentum of MI-FGSM: gradients are L1-normalised per sample and accumulated; 0 is plain PGD.
        seed: of the starts. A sample's start depends on (seed, restart, sample id) only.
        sample_ids: (N,) int64, a name for each sample; None: its place in the batch.
        early_stop: samples that are fooled leave the batch, which shrinks, and the best point seen is kept; False takes
            all steps and gives the last iterate (of the best restart), as adversarial training uses it.

    The model is given back as it was, and no global random state is read or changed.
    """
    if steps < 0 or restarts < 1:
        raise ValueError(f"steps is {steps} and restarts {restarts}; expected at least 0 and at least 1")
    if step_size is not None and not 0 <= step_size < float("inf"):
        raise ValueError(f"step_size is {step_size}; expected a finite number of at least 0, in the [0, 1] pixel range")
    before, objective.passes = objective.passes, Passes()
    try:
        with objective.lent():
            clean, eps, sample_ids = prepare(objective, clean, threat, sample_ids)
            sizes = step_sizes(threat.eps, steps, step_size)
            best = Best(clean)
            if early_stop:
                with torch.no_grad():
                    rows = torch.arange(len(clean), device=clean.device)
                    if len(rows):
                        best.offer(clean, objective(objective.space.to_model(clean)), rows)
            for restart in range(restarts):
                rows = torch.nonzero(~best.fooled).squeeze(1) if early_stop else torch.arange(len(clean))
                if not len(rows):
                    break
                _ascend(
                    objective, clean, threat, eps, sizes, decay, best, rows.to(clean.device), early_stop,
                    (seed + 1_000_003 * restart, sample_ids) if random_start else None,
                )  # fmt: skip
            return best.result(objective.passes)
    finally:
        objective.passes = before + objective.passes


def step_sizes(eps: float, steps: int, step_size: float | None = None) -> list[float]:
    """The size of each of `steps` steps: `step_size`, or None: falling linearly from 2 * eps towards 0."""
    return [2 * eps * (1 - k / steps) if step_size is None else step_size for k in range(steps)]


def _ascend(
    objective: Objective,
    clean: Tensor,
    threat: ThreatModel,
    eps: Tensor,
    sizes: list[float],
    decay: float,
    best: Best,
    rows: Tensor,
    early_stop: bool,
    start: tuple[int, Tensor] | None,
) -> None:
    """One restart over `rows`; what it finds goes to `best`. The batch holds only rows that are not yet fooled."""
    step = ops.pgd_linf_step_ if threat.norm == "linf" else ops.pgd_l2_step_
    space = geometry(objective, clean)
    origin = clean[rows]
    adv = origin.clone()
    if start is not None:
        random_start(objective, adv, origin, eps[rows], start[1][rows], rows, start[0], threat.norm)
    model_input = objective.space.to_model(adv)
    velocity = torch.zeros_like(adv) if decay else None
    radius = eps[rows]
    for size in sizes:
        grad, at = objective.gradient(model_input, rows)
        if early_stop:
            best.offer(adv, at, rows)
            going = at.right
            if not going.all():
                rows, origin, adv, model_input, grad, radius = (
                    t[going] for t in (rows, origin, adv, model_input, grad, radius)
                )
                velocity = None if velocity is None else velocity[going]
                if not len(rows):
                    return
        bad = torch.zeros_like(rows)
        step(
            adv, grad, origin, radius, torch.full_like(radius, size), model_input=model_input, velocity=velocity,
            decay=decay, nonfinite=bad, **space,
        )  # fmt: skip
        best.nonfinite[rows] += bad
    with torch.no_grad():
        at = objective(model_input, rows)
    best.offer(adv, at, rows)


def fgsm(
    objective: Objective,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 1,
    restarts: int = 1,
    seed: int = 0,
    sample_ids: Tensor | None = None,
) -> AttackResult:
    """One step of size eps from the clean image (Goodfellow et al., 2015); other `steps` and `restarts` are refused."""
    if (steps, restarts) != (1, 1):
        raise ValueError(
            f"fgsm takes one step from the clean image; steps is {steps}, restarts {restarts}. Use pgd for more"
        )
    return pgd(objective, clean, threat, steps=1, step_size=threat.eps, random_start=False, sample_ids=sample_ids)


def mi_fgsm(
    objective: Objective,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 10,
    restarts: int = 1,
    seed: int = 0,
    sample_ids: Tensor | None = None,
) -> AttackResult:
    """MI-FGSM (Dong et al., 2018): decay 1, step eps / steps; starts at the clean image, restarts are random."""
    first = pgd(
        objective, clean, threat, steps=steps, step_size=threat.eps / max(steps, 1), decay=1.0, random_start=False,
        seed=seed, sample_ids=sample_ids,
    )  # fmt: skip
    if restarts == 1:
        return first
    more = pgd(
        objective, clean, threat, steps=steps, step_size=threat.eps / max(steps, 1), decay=1.0, restarts=restarts - 1,
        seed=seed, sample_ids=sample_ids,
    )  # fmt: skip
    take = (more.fooled & ~first.fooled) | ((more.fooled == first.fooled) & (more.loss > first.loss))
    return AttackResult(
        torch.where(take.view(-1, *[1] * (more.adv.dim() - 1)), more.adv, first.adv),
        first.fooled | more.fooled,
        torch.where(take, more.loss, first.loss),
        first.passes + more.passes,
        first.nonfinite + more.nonfinite,
    )
