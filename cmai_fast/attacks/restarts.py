"""The code around an ascent: checks the inputs, tries the clean image, keeps the best of all restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast.attacks.gradients import Course, Estimate, Gradient, gradient_of
from cmai_fast.attacks.losses import Loss, loss_of
from cmai_fast.attacks.state import AttackResult, Best, Tally, prepare
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel


@dataclass
class Restart:
    """One ascent from one start, for `rows` (n,) of the batch.

    clean (N, ...), eps and sample_ids (N,) are those of the whole batch. Results go to `best` and `tally`. `number`
    counts restarts from 0, and `seed` is this restart's own.
    """

    victim: Victim
    threat: ThreatModel
    clean: Tensor
    eps: Tensor
    sample_ids: Tensor
    rows: Tensor
    number: int
    seed: int
    loss: Loss
    gradient: Gradient
    best: Best
    tally: Tally

    def estimate(self, steps: int) -> Estimate:
        """The gradient estimator, for `steps` calls."""
        return self.gradient.start(Course(self.victim, self.loss, self.clean, self.sample_ids, steps, self.seed))


def restarted(
    ascend: Callable[[Restart], None],
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None,
    gradient: str | Gradient | None,
    early_stop: bool,
    from_clean: bool = False,
) -> AttackResult:
    """Runs `ascend` once per restart, and returns the best point of each sample.

    Args:
        early_stop: the clean image is a candidate too, and a restart takes only rows that are not yet fooled.
        from_clean: restart 0 draws no noise, so the seeds begin at restart 1.

    The victim's model is restored, and its `passes` grow by those of this attack.
    """
    maximised, estimator = loss_of(loss), gradient_of(gradient)
    with victim.counted(), victim.attack_mode():
        clean, eps, sample_ids = prepare(victim, clean, threat, sample_ids)
        model_input = victim.space.to_model(clean)
        best, tally = Best(clean, model_input, victim.words), Tally(victim, clean)
        rows = torch.arange(len(clean), device=clean.device)
        if early_stop and len(rows):
            with torch.no_grad():
                best.offer(clean, model_input, victim(model_input, None, maximised), rows)
        for number in range(restarts):
            rows = torch.nonzero(~best.fooled | (not early_stop)).squeeze(1)
            if not len(rows):
                break
            if victim.words is not None and number:
                victim.words.restart(rows)
            own = seed + 1_000_003 * max(number - from_clean, 0)
            ascend(
                Restart(victim, threat, clean, eps, sample_ids, rows, number, own, maximised, estimator, best, tally)
            )
        return best.result(victim.passes, tally)
