"""Auto-PGD on the cross-entropy (Croce and Hein, 2020, algorithm 1): a step size that is halved per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gradients import Gradient
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.restarts import Restart, restarted
from cmai_fast.attacks.state import AttackResult, geometry, random_start
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel

_MOMENTUM = 0.75
_RHO = 0.75  # if fewer than this share of steps raised the loss, the step is halved


def checkpoints(steps: int) -> set[int]:
    """The numbers of steps after which the size may be halved: w_j = ceil(p_j * steps) with p_0 = 0, p_1 = 0.22 and
    p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06)."""
    # In hundredths: in binary 0.57 * 100 is slightly above 57, and its ceiling is 58.
    p = [0, 22]
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    return {-(-x * steps // 100) for x in p[1:] if x <= 100}


def _refuse(first_step: float = 2.0, **others: object) -> None:
    if not 0 < first_step < float("inf"):
        raise ValueError(f"apgd: first_step is {first_step}; expected a finite number above 0, in radii")


@attack("apgd", label="APGD", steps=100, refuse=_refuse)
def apgd(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None = None,
    gradient: str | Gradient | None = None,
    early_stop: bool = True,
    first_step: float = 2.0,
) -> AttackResult:
    """APGD (Croce and Hein, 2020), on the cross-entropy unless `loss` says otherwise.

    Args:
        first_step: size of the first steps, in radii (eps); 1 in RobustVLM.
        early_stop: samples that are fooled leave the batch; with False the result is still the best point found.

    As in the authors' code, checkpoint w_j is reached when x^(w_j) has been evaluated; its two conditions need no more.
    """
    if victim.words is not None:
        raise ValueError("words are under attack, which APGD does not move; use pgd")
    return restarted(
        lambda run: _Run(run, steps, early_stop, first_step).ascend(steps),
        victim, clean, threat, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=loss, gradient=gradient,
        early_stop=early_stop,
    )  # fmt: skip


class _Run:
    """One restart: the state of each row that is still in the batch."""

    def __init__(self, run: Restart, steps: int, early_stop: bool, first_step: float) -> None:
        self.run, self.early_stop = run, early_stop
        victim, norm = run.victim, run.threat.norm
        self.step = ops.apgd_linf_step_ if norm == "linf" else ops.apgd_l2_step_
        self.estimate, self.count = run.estimate(steps + 1), 0
        self.space = geometry(victim, run.clean)
        self.rows, self.clean, self.eps = run.rows, run.clean[run.rows], run.eps[run.rows]
        self.adv = torch.empty_like(self.clean)
        random_start(victim, self.adv, self.clean, self.eps, run.sample_ids[run.rows], run.rows, run.seed, norm)
        self.previous = self.adv.clone()
        self.model_input = victim.space.to_model(self.adv)
        self.size = first_step * self.eps
        self.evaluate()
        # The next step first stores a row's best point if it improved, or returns to it if it restarts.
        self.improved, self.restart = torch.ones_like(self.right), torch.zeros_like(self.right)
        self.top_adv, self.top_grad = torch.empty_like(self.adv), torch.empty_like(self.grad)
        self.top_loss, self.top_at_check = self.loss, self.loss
        self.rises = torch.zeros_like(self.loss)
        self.halved_at_check = torch.zeros_like(self.right)

    def evaluate(self) -> None:
        """Computes loss, gradient and verdict at `adv`, and offers it to `best`."""
        self.grad, at = self.estimate(self.model_input, self.rows, self.count)
        self.count += 1
        if at is None:  # the gradient did not run the language model, but halving needs the loss
            with torch.no_grad():
                at = self.run.victim(self.model_input, self.rows, self.run.loss)
        self.loss, self.right = at.loss.to(self.adv), at.right
        self.run.best.offer(self.adv, self.model_input, at, self.rows)

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
            self.run.tally.add(self.grad, bad, self.rows)
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
        """Halves the step of rows that stopped improving (conditions 1 and 2); these return to their best point."""
        stuck = self.rises < _RHO * steps
        stuck |= ~self.halved_at_check & (self.top_at_check >= self.top_loss)
        self.size = torch.where(stuck, self.size / 2, self.size)
        self.loss = torch.where(stuck, self.top_loss, self.loss)
        self.restart = self.halved_at_check = stuck
        self.top_at_check = self.top_loss
        self.rises = torch.zeros_like(self.loss)
