"""Auto-PGD on the cross-entropy (Croce and Hein, 2020, algorithm 1): steps that halve themselves, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.objective import Objective, Passes
from cmai_fast.attacks.state import AttackResult, Best, geometry, prepare, random_start
from cmai_fast.threat import ThreatModel

_MOMENTUM = 0.75
_RHO = 0.75  # share of steps that must have raised the loss, or the step is halved


def checkpoints(steps: int) -> set[int]:
    """After how many steps the size may be halved: w_j = ceil(p_j * steps) with p_0 = 0, p_1 = 0.22 and
    p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06)."""
    # In whole hundredths: in binary 0.57 * 100 comes out above 57, and its ceiling is 58.
    p = [0, 22]
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    return {-(-x * steps // 100) for x in p[1:] if x <= 100}


def apgd(
    objective: Objective,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """APGD-CE (Croce and Hein, 2020), whose first step is 2 * eps.

    Arguments and result are those of `cmai_fast.attacks.pgd`, but with `early_stop=False` the result is still the best
    point found. As in the authors' own code, checkpoint w_j comes when x^(w_j) has been evaluated, which is all that
    its two conditions look at.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps is {steps} and restarts {restarts}; expected at least 1 of each")
    before, objective.passes = objective.passes, Passes()
    try:
        with objective.lent():
            clean, eps, sample_ids = prepare(objective, clean, threat, sample_ids)
            best = Best(clean)
            if early_stop and len(clean):
                with torch.no_grad():
                    rows = torch.arange(len(clean), device=clean.device)
                    best.offer(clean, objective(objective.space.to_model(clean)), rows)
            for restart in range(restarts):
                rows = torch.nonzero(~best.fooled | (not early_stop)).squeeze(1)
                if not len(rows):
                    break
                start = seed + 1_000_003 * restart
                _Run(objective, clean, threat, eps, sample_ids, best, rows, early_stop, start).ascend(steps)
            return best.result(objective.passes)
    finally:
        objective.passes = before + objective.passes


class _Run:
    """One restart: the state of each row that is still in the batch."""

    def __init__(
        self,
        objective: Objective,
        clean: Tensor,
        threat: ThreatModel,
        eps: Tensor,
        sample_ids: Tensor,
        best: Best,
        rows: Tensor,
        early_stop: bool,
        seed: int,
    ) -> None:
        self.objective, self.best, self.early_stop = objective, best, early_stop
        self.step = ops.apgd_linf_step_ if threat.norm == "linf" else ops.apgd_l2_step_
        self.space = geometry(objective, clean)
        self.rows, self.clean, self.eps = rows, clean[rows], eps[rows]
        self.adv = torch.empty_like(self.clean)
        random_start(objective, self.adv, self.clean, self.eps, sample_ids[rows], rows, seed, threat.norm)
        self.previous = self.adv.clone()
        self.model_input = objective.space.to_model(self.adv)
        self.size = 2 * self.eps
        self.evaluate()
        # What the next step does first: the point it starts from is a row's best so far, or the row goes back there.
        self.improved, self.restart = torch.ones_like(self.right), torch.zeros_like(self.right)
        self.top_adv, self.top_grad = torch.empty_like(self.adv), torch.empty_like(self.grad)
        self.top_loss, self.top_at_check = self.loss, self.loss
        self.rises = torch.zeros_like(self.loss)
        self.halved_at_check = torch.zeros_like(self.right)

    def evaluate(self) -> None:
        """Loss, gradient and verdict at `adv`; what fools goes to `best`."""
        self.grad, at = self.objective.gradient(self.model_input, self.rows)
        self.loss, self.right = at.loss.to(self.adv), at.right
        self.best.offer(self.adv, at, self.rows)

    def drop_fooled(self) -> None:
        if not self.early_stop or self.right.all():
            return
        keep = self.right
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[keep])

    def ascend(self, steps: int) -> None:
        checks, last_check = checkpoints(steps), 0
        self.drop_fooled()
        for k in range(steps):
            if not len(self.rows):
                return
            bad = torch.zeros_like(self.rows)
            self.step(
                self.adv, self.previous, self.grad, self.top_adv, self.top_grad, self.clean, self.eps, self.size,
                self.improved, self.restart, _MOMENTUM if k else 1.0, model_input=self.model_input, nonfinite=bad,
                **self.space,
            )  # fmt: skip
            self.best.nonfinite[self.rows] += bad
            self.previous, self.adv = self.adv, self.previous
            old_loss = self.loss
            self.evaluate()
            self.rises += (self.loss > old_loss).to(self.rises)
            self.improved = self.loss > self.top_loss
            self.restart = torch.zeros_like(self.improved)
            self.top_loss = torch.where(self.improved, self.loss, self.top_loss)
            if k + 1 in checks:
                self.halve(k + 1 - last_check)
                last_check = k + 1
            self.drop_fooled()

    def halve(self, steps: int) -> None:
        """Halves the step of rows that stopped improving (conditions 1 and 2), which go back to their best point."""
        stuck = self.rises < _RHO * steps
        stuck |= ~self.halved_at_check & (self.top_at_check >= self.top_loss)
        self.size = torch.where(stuck, self.size / 2, self.size)
        self.loss = torch.where(stuck, self.top_loss, self.loss)
        self.restart = self.halved_at_check = stuck
        self.top_at_check = self.top_loss
        self.rises = torch.zeros_like(self.loss)
