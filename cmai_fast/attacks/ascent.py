"""Gradient ascent in a ball: the loop shared by FGSM, PGD, MI-FGSM and the inner solvers of MBAT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.gradients import Estimate
from cmai_fast.attacks.restarts import Restart
from cmai_fast.attacks.state import Best, Tally, geometry, random_start
from cmai_fast.attacks.victim import Victim


def step_sizes(eps: float, steps: int, step_size: float | None = None) -> list[float]:
    """The size of each of `steps` steps: `step_size`, or if None, decreasing linearly from 2 * eps towards 0."""
    return [2 * eps * (1 - k / steps) if step_size is None else step_size for k in range(steps)]


@dataclass
class Ascent:
    """The rows under attack with their images, in [0, 1] and in the model's input space.

    rows: (n,) of the batch. None: all rows, and none is dropped.
    """

    clean: Tensor
    eps: Tensor
    adv: Tensor
    model_input: Tensor
    rows: Tensor | None = None
    velocity: Tensor | None = None

    @classmethod
    def begin(
        cls,
        victim: Victim,
        clean: Tensor,
        eps: Tensor,
        norm: str,
        *,
        rows: Tensor | None = None,
        noise: tuple[int, Tensor] | None = None,
        momentum: bool = False,
    ) -> Ascent:
        """Starts at `clean` (n, ...), or with `noise` (a seed and sample ids (n,)) at a random point of the ball.

        `momentum`: accumulate gradients.
        """
        adv = clean.clone()
        if noise is not None:
            place = torch.arange(len(clean)) if rows is None else rows
            random_start(victim, adv, clean, eps, noise[1], place, noise[0], norm)
        velocity = torch.zeros_like(adv) if momentum else None
        return cls(clean, eps, adv, victim.space.to_model(adv), rows, velocity)

    def keep(self, mask: Tensor) -> None:
        """Drops the rows where `mask` (n,) is False."""
        for name, value in vars(self).items():
            if value is not None:
                setattr(self, name, value[mask])


def ascend(
    victim: Victim,
    at: Ascent,
    estimate: Estimate,
    sizes: Sequence[float],
    norm: str,
    tally: Tally,
    *,
    decay: float = 0.0,
    best: Best | None = None,
) -> None:
    """Takes a step of each of `sizes` along the estimated gradient, in place: afterwards `at` holds the last iterate.

    With `best`, each evaluated iterate is offered to it, and fooled rows are dropped from the batch. Words under attack
    take a step wherever the gradient came with theirs.
    """
    step = ops.pgd_linf_step_ if norm == "linf" else ops.pgd_l2_step_
    space = geometry(victim, at.clean)
    for k, size in enumerate(sizes):
        grad, found = estimate(at.model_input, at.rows, k)
        if best is not None and found is not None:
            assert at.rows is not None
            best.offer(at.adv, at.model_input, found, at.rows)
            if not found.right.all():
                at.keep(found.right)
                grad = grad[found.right]
                if not len(at.rows):
                    return
        bad = torch.zeros(len(grad), dtype=torch.int64, device=grad.device)
        step(
            at.adv, grad, at.clean, at.eps, torch.full_like(at.eps, size), model_input=at.model_input,
            velocity=at.velocity, decay=decay, nonfinite=bad, **space,
        )  # fmt: skip
        tally.add(grad, bad, at.rows)
        if victim.words is not None:
            victim.words.climb(2 * (1 - k / len(sizes)), at.rows)


def ascend_restart(run: Restart, sizes: Sequence[float], *, noise: bool, decay: float, early_stop: bool) -> None:
    """One restart of an attack. The last iterate is also evaluated and offered to `run.best`."""
    clean, eps, rows = run.clean[run.rows], run.eps[run.rows], run.rows
    start = (run.seed, run.sample_ids[rows]) if noise else None
    at = Ascent.begin(run.victim, clean, eps, run.threat.norm, rows=rows, noise=start, momentum=decay > 0)
    ascend(
        run.victim, at, run.estimate(len(sizes)), sizes, run.threat.norm, run.tally, decay=decay,
        best=run.best if early_stop else None,
    )  # fmt: skip
    assert at.rows is not None
    if len(at.rows):
        with torch.no_grad():
            found = run.victim(at.model_input, at.rows, run.loss)
        run.best.offer(at.adv, at.model_input, found, at.rows)
