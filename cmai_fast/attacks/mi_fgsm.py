"""The momentum iterative FGSM (Dong et al., 2018)."""

from __future__ import annotations

from torch import Tensor

from cmai_fast.attacks.ascent import ascend_restart, step_sizes
from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gradients import Gradient
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.restarts import restarted
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel


def _refuse(decay: float = 1.0) -> None:
    if not 0 < decay < float("inf"):
        raise ValueError(f"mi-fgsm: decay is {decay}; expected a finite number above 0 (for 0 use pgd)")


@attack("mi-fgsm", label="MI-FGSM", steps=10, least=0, refuse=_refuse)
def mi_fgsm(
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
    decay: float = 1.0,
) -> AttackResult:
    """MI-FGSM (Dong et al., 2018): steps of eps / steps from the clean image; further restarts begin at random
    points, for samples not yet fooled.

    Args:
        decay: mu, the decay factor of the accumulated gradient per step.
    """
    sizes = step_sizes(threat.eps, steps, threat.eps / max(steps, 1))
    return restarted(
        lambda run: ascend_restart(run, sizes, noise=run.number > 0, decay=decay, early_stop=True),
        victim, clean, threat, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=loss, gradient=gradient,
        early_stop=True, from_clean=True,
    )  # fmt: skip
