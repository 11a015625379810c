"""Trains a verifier: against all alternatives of an answer, on clean images and on images attacked for this purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast.attacks import Victim
from cmai_fast.attacks.ascent import Ascent, ascend, step_sizes
from cmai_fast.attacks.gradients import Course, Exact
from cmai_fast.attacks.state import Tally, prepare
from cmai_fast.attacks.victim import Outputs
from cmai_fast.bridge import frozen
from cmai_fast.cmcv.verifier import Texts, Verifier
from cmai_fast.data import Sample
from cmai_fast.mbat.muon import MuonAdamW, hidden_matrices
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel


@dataclass(frozen=True)
class AnswerLoss:
    """An attack's loss: the verifier's cross-entropy of the true answer among its alternatives."""

    verifier: Verifier
    texts: Texts

    def __call__(self, features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        logits = self.verifier.logits(features, self.texts.rows(rows), victim.image_tokens(rows))
        return logits.logsumexp(1) - logits[:, 0]


def fit_verifier(
    verifier: Verifier,
    space: PixelSpace,
    batches: Iterator[tuple[Sequence[Sample], Mapping[str, Tensor]]],
    steps: int,
    threat: ThreatModel,
    *,
    inner_steps: int = 3,
    learning_rate: float = 2e-3,
    train_tower: bool = False,
    seed: int = 0,
    on_step: Callable[[int, float, float], None] | None = None,
) -> None:
    """Trains the verifier's network, then with `train_tower` its tower too: `steps` batches, after twice as many clean
    ones.

    The loss is InfoNCE of the true answer against all its alternatives, half on clean images, half on images that
    maximise it in the ball (PGD; eps rises over the first tenth). Both are left in evaluation mode, frozen.

    What is asked is learnt on the clean batches, which cost a tenth: on easy-VQA 300 batches of both alone, without
    them, read 31% of wrong answers as wrong at 5% false rejections.

    Args:
        batches: samples and their batch, as the model's collator makes it.
        inner_steps: of the attack; 0 trains on clean images alone.
        on_step: called with (batch, clean loss, adversarial loss) after each of the 3 * `steps` batches.

    Raises:
        ValueError: `train_tower` without a tower of its own: it would change the model.
    """
    if train_tower and verifier.tower is None:
        raise ValueError("train_tower is set, and the verifier reads the model's own features; give it a tower")
    network, tower = verifier.network, verifier.bridge.model
    vision = list(verifier.bridge.vision_parameters) if train_tower else []
    matrices = set(hidden_matrices(tower)) & set(vision)
    groups = [{"params": [p for p in vision if p in matrices]}]
    others = [{"params": list(network.parameters())}, {"params": [p for p in vision if p not in matrices]}]
    optimizer = MuonAdamW(groups, others, learning_rate)
    first = 2 * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(first + steps, 1), pct_start=0.1, cycle_momentum=False,
        anneal_strategy="linear",
    )  # fmt: skip
    learning = [*network.parameters(), *vision]
    try:
        for p in learning:
            p.requires_grad_(True)
        for step in range(-first, steps):
            samples, batch = next(batches)
            victim = Victim(verifier.bridge, space, batch)
            texts = verifier.texts(
                [s.prompt for s in samples], [s.answer for s in samples], [s.choices for s in samples]
            )
            clean = victim.pixels()
            images = [victim.space.to_model(clean)]
            if inner_steps and step >= 0:
                ball = ThreatModel(threat.norm, threat.eps * min(1.0, 10 * (step + 1) / steps))
                images.append(_attacked(verifier, victim, texts, clean, ball, inner_steps, seed + step))
            losses = [_loss(verifier, victim, texts, x, train_tower and step >= 0) for x in images]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(first + step, losses[0].item(), losses[-1].item())
    finally:
        for p in learning:
            p.requires_grad_(False)
            p.grad = None


def _attacked(
    verifier: Verifier, victim: Victim, texts: Texts, clean: Tensor, ball: ThreatModel, steps: int, seed: int
) -> Tensor:
    """Images in the model's input space on which the verifier prefers a wrong answer, if it can be made to."""
    fixed = Texts(*(value.detach() for value in vars(texts).values()))
    with victim.attack_mode(), frozen(verifier.network):
        clean, eps, ids = prepare(victim, clean, ball, None)
        estimate = Exact().start(Course(victim, AnswerLoss(verifier, fixed), clean, ids, steps, seed))
        at = Ascent.begin(victim, clean, eps, ball.norm, noise=(seed, ids))
        ascend(victim, at, estimate, step_sizes(ball.eps, steps), ball.norm, Tally(victim, clean))
    return at.model_input


def _loss(verifier: Verifier, victim: Victim, texts: Texts, model_input: Tensor, train_tower: bool) -> Tensor:
    with torch.set_grad_enabled(train_tower):
        features = victim.encode(model_input)
    return AnswerLoss(verifier, texts)(features, victim.outputs(features), victim, None).mean()
