"""Greedy coordinate gradient (Zou et al., 2023): random substitutions among the most promising, the best one kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.substitution import Propose, check_rules, rules, substituted
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel


def drawn(top_k: int) -> Propose:
    """Substitutions drawn at random from the `top_k` candidates of each place, the place at random as well."""

    def propose(gain: Tensor, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
        values, best = gain.topk(min(top_k, gain.shape[1]), dim=1)
        room = (values > float("-inf")).sum(1).tolist()
        places = [p for p, k in enumerate(room) if k]
        ranked = best.tolist()
        # Far more draws than there are substitutions to find: without end where the vocabulary is small.
        for _ in range(8 * sum(room)):
            p = places[int(rng.integers(len(places)))]
            yield p, ranked[p][int(rng.integers(room[p]))]

    return propose


@attack("gcg", label="GCG", steps=10, text=True, refuse=partial(check_rules, "gcg"))
def gcg(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None = None,
    edits: int = 1,
    readable: bool = True,
    keep: str = "",
    candidates: int = 64,
    top_k: int = 256,
) -> AttackResult:
    """GCG (algorithm 1) on the words that users typed.

    Args:
        steps, edits, readable, keep: as of `hotflip`.
        candidates: B, how many random substitutions a step evaluates by forward passes; it goes on from the best.
        top_k: of the estimated gains at each place, how many are drawn from.

    The image stays; `threat` is not used. Draws depend on (seed, restart, step, sample id) only.
    """
    return substituted(
        victim, clean, threat, steps=steps, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=loss,
        rules=rules(edits, readable, keep, candidates), propose=drawn(top_k),
    )  # fmt: skip
