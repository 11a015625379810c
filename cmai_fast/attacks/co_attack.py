"""Co-Attack (Zhang et al., 2022) on dual encoders: the captions first, then the image away from both."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.joint import Joint, captions_of, check_joint
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.substitution import rules
from cmai_fast.attacks.victim import Outputs, Victim
from cmai_fast.threat import ThreatModel


def divergence(to: Tensor, of: Tensor) -> Tensor:
    """KL(softmax(to) || softmax(of)) (n,) of embeddings (n, D)."""
    return F.kl_div(of.log_softmax(-1), to.softmax(-1), reduction="none").sum(-1)


def _refuse(alpha: float = 3.0, **given: object) -> None:
    check_joint("co-attack", alpha=alpha, **given)


@attack("co-attack", label="Co-Attack", steps=10, text=True, refuse=_refuse)
def co_attack(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    alpha: float = 3.0,
    edits: int = 1,
    readable: bool = True,
    keep: str = "",
    candidates: int = 10,
) -> AttackResult:
    """Substitutes up to `edits` words of each caption so that its embedding moves as far as it can from where it was,
    then moves the image away from its own embedding and, with weight `alpha`, from those of the changed captions, by
    PGD (section 3.2, for encoders without fusion; distances are KL divergences of softmaxed embeddings).

    Args:
        steps: of the image.
        edits, readable, keep, candidates: as of `hotflip`, which takes the place of the paper's masked language model:
            a step for each edit.
    """
    joint = Joint(victim, captions_of(victim), rules(edits, readable, keep, candidates), seed)

    def away_from_itself(features: Tensor, rows: Tensor, text: Tensor) -> Tensor:
        return divergence(joint.typed[rows], text)

    def away_from_both(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        image, own = features.squeeze(1), victim.own_features(rows).squeeze(1)
        from_text = joint.mean(
            lambda at, texts: divergence(F.normalize(texts, dim=-1), F.normalize(at, dim=-1)), image, rows
        )
        return divergence(own, image) + alpha * from_text

    with joint.running(clean, sample_ids):
        joint.reword(away_from_itself)
        joint.move(threat, away_from_both, steps=steps, restarts=restarts)
        return joint.result()
