"""HotFlip (Ebrahimi et al., 2018): substitutes the tokens of a prompt that the gradient says matter most."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.substitution import check_rules, rules, substituted
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel


def steepest(gain: Tensor, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    values, flat = gain.flatten().sort(descending=True, stable=True)
    for value, place in zip(values.tolist(), flat.tolist(), strict=True):
        if value == float("-inf"):
            return
        yield divmod(place, gain.shape[1])


@attack("hotflip", label="HotFlip", steps=10, text=True, refuse=partial(check_rules, "hotflip"))
def hotflip(
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
    candidates: int = 8,
) -> AttackResult:
    """Goes from prompt to prompt by the substitution with the largest first-order estimate (section 3.1). Where the
    budget is used up, a substitution elsewhere takes an earlier one back.

    Args:
        steps: gradients. Restarts after the first begin at random substitutions.
        edits: the largest number of tokens that differ from what was typed; template, special and image tokens stay.
        readable: whole words are replaced by whole words of the vocabulary, written in the same case.
        keep: words that stay and are never put in, with commas between them, such as those that change the right
            answer.
        candidates: how many of the largest estimates a step evaluates; it goes on from the best.

    The image stays; `threat` is not used. A substituted prompt reads back as exactly its tokens when it is typed.
    """
    return substituted(
        victim, clean, threat, steps=steps, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=loss,
        rules=rules(edits, readable, keep, candidates), propose=steepest,
    )  # fmt: skip
