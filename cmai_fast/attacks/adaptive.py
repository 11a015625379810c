"""The adaptive attack on a guarded model: a wrong answer that the guard accepts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast.attacks.ascent import Ascent, ascend, step_sizes
from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.deployed import Aim
from cmai_fast.attacks.gradients import Course, Estimate
from cmai_fast.attacks.losses import cross_entropy, margin
from cmai_fast.attacks.state import AttackResult, Best, Tally, prepare
from cmai_fast.attacks.victim import Evaluation, Outputs, Victim
from cmai_fast.bridge.backward import differentiate
from cmai_fast.threat import ThreatModel

MODES = ("selective", "orthogonal", "lagrangian")
_KAPPA = 0.1  # how far above the threshold the Lagrangian wants the score


def _refuse(**settings: object) -> None:
    if settings.get("mode", "all") not in (*MODES, "all"):
        raise ValueError(f"mode is {settings['mode']!r}; expected one of {', '.join(MODES)}, or all")
    if int(settings.get("targets", 1)) < 1:  # type: ignore[call-overload]
        raise ValueError(f"targets is {settings['targets']}; expected at least 1 wrong answer per sample")


@attack("adaptive", label="Adaptive", steps=100, restarts=3, guard=True, refuse=_refuse)
def adaptive(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    mode: str = "all",
    targets: int = 2,
) -> AttackResult:
    """Knows the guard, its verifier and threshold, and wants an image whose wrong answer is accepted.

    Each restart aims at every one of `targets` wrong answers in turn, those that the guard is nearest to accepting
    first. `lead` is the log-probability by which the model prefers the wanted answer, `excess` the score of that answer
    above the threshold; both must be positive.

    Args:
        mode: `selective` ascends the lead until the model gives the wanted answer, then the excess (Bryniarski et al.,
            2022, section 3.2); `orthogonal` the same, without the component along the other's gradient (section 3.1);
            `lagrangian` lead - c * max(0, kappa - excess), with c searched per sample over the restarts (Carlini and
            Wagner, 2017). `all`: restart by restart, in this order.
        targets: wrong answers tried per sample.

    `fooled` means fooled and accepted. The loss is the smaller of lead and excess.
    """
    if victim.deployed is None:
        raise ValueError(
            "the adaptive attack needs a guarded model, with a score and its threshold; calibrate it (cmai-fast "
            "calibrate), or choose another attack"
        )
    with victim.counted():
        wrong = victim.deployed.wrong()
        most = max(map(len, wrong), default=0)
        aims = [
            victim.deployed.aim([w[min(c, len(w) - 1)] if w else "" for w in wrong]) for c in range(min(targets, most))
        ]
        counts = torch.tensor([len(w) for w in wrong])
        with victim.attack_mode(), victim.deployed.frozen():
            clean, eps, sample_ids = prepare(victim, clean, threat, sample_ids)
            best, tally = Best(clean, victim.space.to_model(clean)), Tally(victim, clean)
            cost = [torch.ones_like(eps) for _ in aims]
            for number in range(restarts):
                how = MODES[number % len(MODES)] if mode == "all" else mode
                for c, aim in enumerate(aims):
                    rows = torch.nonzero(~best.fooled & (counts.to(eps.device) > c)).squeeze(1)
                    if not len(rows):
                        continue
                    own = seed + 1_000_003 * number
                    at = Ascent.begin(
                        victim, clean[rows], eps[rows], threat.norm, rows=rows, noise=(own, sample_ids[rows])
                    )
                    gradient = Evading(aim, how, cost[c])
                    estimate = gradient.start(Course(victim, cross_entropy, clean, sample_ids, steps, own))
                    ascend(victim, at, estimate, step_sizes(threat.eps, steps), threat.norm, tally, best=best)
                    assert at.rows is not None
                    if len(at.rows):
                        with torch.no_grad():
                            lead, excess = gradient.parts(victim, at.model_input, at.rows)
                        best.offer(at.adv, at.model_input, _judged(lead, excess), at.rows)
                        # Fooled but rejected: the guard's term was too cheap; accepted but right: too dear.
                        cost[c][at.rows] *= torch.where(lead > 0, 5.0, torch.where(excess >= 0, 0.2, 1.0)).to(eps)
            return best.result(victim.passes, tally)


def _judged(lead: Tensor, excess: Tensor) -> Evaluation:
    return Evaluation(torch.minimum(lead, excess).detach(), ~((lead > 0) & (excess >= 0)))


@dataclass(frozen=True)
class Evading:
    """The gradient of an adaptive attack; `cost` (N,) is c of the Lagrangian."""

    aim: Aim
    mode: str
    cost: Tensor

    def parts(self, victim: Victim, model_input: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Lead and excess (n,), differentiable."""
        features = victim.encode(model_input, rows)
        outputs = Outputs(victim, features, rows, self.aim.texts)
        excess = self.aim.excess(features, victim.image_tokens(rows), victim.read(model_input, rows), rows)
        return -margin(features, outputs, victim, rows), excess

    def start(self, course: Course) -> Estimate:
        victim = course.victim

        def estimate(model_input: Tensor, rows: Tensor | None, step: int) -> tuple[Tensor, Evaluation]:
            with torch.enable_grad():
                leaf = model_input.detach().clone().requires_grad_()
                lead, excess = self.parts(victim, leaf, rows)
                victim.ran(rows, backward=True)
                if self.mode == "orthogonal":
                    grad = self._orthogonal(victim, lead, excess, leaf)
                else:
                    grad = differentiate(victim.bridge.model, self._loss(lead, excess, rows), leaf)
            return grad, _judged(lead.detach(), excess.detach())

        return estimate

    def _loss(self, lead: Tensor, excess: Tensor, rows: Tensor | None) -> Tensor:
        if self.mode == "selective":
            return torch.where(lead > 0, excess, lead)
        cost = self.cost if rows is None else self.cost[rows]
        return lead - cost * (_KAPPA - excess).clamp_min(0)

    def _orthogonal(self, victim: Victim, lead: Tensor, excess: Tensor, leaf: Tensor) -> Tensor:
        model = victim.bridge.model
        (of_lead,) = torch.autograd.grad(lead.sum(), leaf, retain_graph=True)
        of_excess = differentiate(model, excess, leaf)
        first = (lead.detach() <= 0).view(-1, *[1] * (leaf.dim() - 1))
        wanted, other = torch.where(first, of_lead, of_excess), torch.where(first, of_excess, of_lead)
        along = (wanted * other).flatten(1).sum(1) / other.flatten(1).square().sum(1).clamp_min(
            torch.finfo(other.dtype).tiny
        )
        return wanted - along.view(-1, *[1] * (leaf.dim() - 1)) * other
