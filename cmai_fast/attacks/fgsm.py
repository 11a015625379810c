"""The fast gradient sign method (Goodfellow et al., 2015)."""

from __future__ import annotations

from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gradients import Gradient
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.pgd import pgd
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel


@attack("fgsm", label="FGSM", steps=1, single=True)
def fgsm(
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
) -> AttackResult:
    """One step of size eps from the clean image; other `steps` and `restarts` are refused."""
    return pgd(
        victim, clean, threat, steps=steps, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=loss,
        gradient=gradient, step_size=threat.eps, random_start=False,
    )  # fmt: skip
