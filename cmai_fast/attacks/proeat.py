"""The attack of ProEAT / E2AT (arXiv 2503.04833): tokens behind the question by GCG, then the image by PGD."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gcg import drawn
from cmai_fast.attacks.gradients import Gradient
from cmai_fast.attacks.losses import Loss, loss_of
from cmai_fast.attacks.pgd import pgd
from cmai_fast.attacks.prompts import Prompts, prompts_of
from cmai_fast.attacks.state import AttackResult, prepare
from cmai_fast.attacks.substitution import Search, check_rules, rules
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel


@attack("proeat", label="ProEAT", steps=10, text=True, refuse=partial(check_rules, "proeat"))
def proeat(
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
    tokens: int = 20,
    top_k: int = 256,
    candidates: int = 64,
    readable: bool = False,
) -> AttackResult:
    """Appends `tokens` tokens to each question, which stays as it is, searches them by GCG at the clean image, then
    searches the image by PGD with the prompt that was found, in steps of eps / 4.

    Args:
        steps: of GCG, and of PGD.
        restarts: of PGD.
        top_k, candidates: as of `gcg`.
        readable: only words are appended.
    """
    prompts = prompts_of(victim)
    with victim.counted():
        with victim.attack_mode():
            clean, _, sample_ids = prepare(victim, clean, threat, sample_ids)
            with torch.no_grad():
                features = victim.encode(victim.space.to_model(clean))
            victim.passes.vision_forward += 1
            texts = prompts.read(_longer(prompts, tokens, sample_ids.tolist(), seed))
            judge = prompts.judge(victim, features, texts, loss_of(loss))
            search = Search(
                victim, texts, judge, sample_ids.tolist(), rules(1, readable, "", candidates), last=tokens
            )  # fmt: skip
            search.run(steps, drawn(top_k), seed)
        ids = torch.stack([texts.ids(line.row, line.best) for line in search.lines])
        with _asked(victim, {**texts.inputs, "input_ids": ids}):
            found = pgd(
                victim, clean, threat, steps=steps, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=loss,
                gradient=gradient, step_size=threat.eps / 4,
            )  # fmt: skip
        return replace(found, prompts=search.best(), passes=victim.passes)


@contextmanager
def _asked(victim: Victim, texts: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the victim's language side reads these texts."""
    own, victim.batch = victim.batch, texts
    try:
        yield
    finally:
        victim.batch = own


def _longer(prompts: Prompts, count: int, sample_ids: Sequence[int], seed: int) -> list[str]:
    """Each text with `count` random words of a token each behind it; a sample's depend on (seed, sample id) only.

    Raises:
        ValueError: the vocabulary has too few of them.
    """
    own = prompts.collate.user_tokens(prompts.samples)
    vocabulary = prompts.vocabulary
    words = [vocabulary.spelled[token] for token in vocabulary.allowed(True, frozenset())]
    found = []
    for tokens, sample_id in zip(own, sample_ids, strict=True):
        text, rng = tokens.text.rstrip(), np.random.default_rng((seed, sample_id % 2**64))
        tried = [words[int(k)] for k in rng.integers(len(words), size=16 * count)] if words else []
        read = prompts.collate.read([tokens.prompt(f"{text} {word}") for word in tried]) if tried else []
        good = [w for w, ids in zip(tried, read, strict=True) if len(ids) == len(tokens.whole) + 1]
        if len(good) < count:
            raise ValueError(
                f"{count} words of one token each are to stand behind {text!r:.60}, and only {len(good)} of "
                f"{len(tried)} tried are such words; set tokens lower"
            )
        found.append(" ".join([text, *good[:count]]))
    return found
