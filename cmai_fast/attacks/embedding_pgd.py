"""PGD on the input embeddings of what users typed (Miyato et al., 2017), alone or together with the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cmai_fast.attacks.ascent import ascend_restart, step_sizes
from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gradients import Gradient
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.prompts import prompts_of
from cmai_fast.attacks.restarts import Restart, restarted
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.victim import Evaluation, Victim
from cmai_fast.attacks.words import Words
from cmai_fast.bridge.labels import IGNORE
from cmai_fast.threat import ThreatModel, WordBall


def _refuse(text_norm: str = "l2", text_eps: float = 0.1, **others: object) -> None:
    WordBall(text_norm, text_eps)  # type: ignore[arg-type]  # raises for another norm


@attack("embedding-pgd", label="Embedding PGD", steps=10, text=True, refuse=_refuse)
def embedding_pgd(
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
    text_norm: str = "l2",
    text_eps: float = 0.1,
    image: bool = False,
) -> AttackResult:
    """PGD on the words, each in a ball of its own (`WordBall`); template, special and image tokens stay.

    Nobody can type such words: the result bounds from above what rewording within the same distance can do.

    Args:
        steps: step sizes decrease linearly from twice the radius to 0, for words as for pixels.
        gradient: of the image; the words' is always exact.
        text_norm, text_eps: the ball of each word, relative to the length of its embedding.
        image: attacks the image in `threat` at the same time, with the gradients of the same passes; False: it stays,
            and `threat` is not used.
    """
    ball = WordBall(text_norm, text_eps)  # type: ignore[arg-type]
    texts = prompts_of(victim).read()
    before = victim.words
    victim.words = words = Words(victim.bridge, victim.bridge.inputs(victim.batch)[1], ball, texts.mask)
    try:
        if image:
            sizes = step_sizes(threat.eps, steps)
            climb = lambda run: ascend_restart(run, sizes, noise=True, decay=0.0, early_stop=True)  # noqa: E731
        else:
            climb = lambda run: _reworded(run, words, steps)  # noqa: E731
        result = restarted(
            climb, victim, clean, threat, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=loss,
            gradient=gradient, early_stop=True,
        )  # fmt: skip
    finally:
        victim.words = before
    return replace(result, words=_of_prompts(victim.batch, words.best))


def _reworded(run: Restart, words: Words, steps: int) -> None:
    """The ascent of the words alone: the images are encoded once."""
    victim, rows = run.victim, run.rows
    at = victim.space.to_model(run.clean)
    with torch.no_grad():
        features = victim.encode(at[rows], rows)
    victim.passes.vision_forward += 1
    for k in range(steps + 1):
        with torch.enable_grad() if k < steps else torch.no_grad():
            outputs = victim.outputs(features, rows)
            losses = run.loss(features, outputs, victim, rows)
            if k < steps:
                words.slope_of(losses)
                victim.ran(rows, backward=True)
        found = Evaluation(losses.detach(), outputs.right)
        run.best.offer(run.clean[rows], at[rows], found, rows)
        rows, features = rows[found.right], features[found.right]
        if not len(rows):
            return
        if k < steps:
            run.tally.zero_gradients[rows] += words.flat(rows)
            words.climb(2 * (1 - k / steps), rows)


def _of_prompts(batch: Mapping[str, Tensor], delta: Tensor) -> list[Tensor]:
    """The rows of delta (N, L, text_dim) at the tokens of each prompt, on the CPU."""
    prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)
    return [row[own].cpu() for row, own in zip(delta, prompt, strict=True)]
