"""Trains a verifier: against all alternatives of an answer, on clean images and on images attacked for this purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast.attacks import Victim
from cmai_fast.attacks.ascent import step_sizes
from cmai_fast.attacks.gradients import Exact
from cmai_fast.attacks.victim import Outputs
from cmai_fast.bridge import frozen
from cmai_fast.cmcv.verifier import Texts, Verifier
from cmai_fast.mbat.inner import InnerResult, climbed
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel

# Of an attack on a vision side. After 1,200 steps against attacks of one step, that of `easyvqa-llava` read 71% of
# shapes under PGD-20 at 16/255, after as many against three 81% (benchmarks/recipes/harden_vision.py).
INNER_STEPS = 3


@dataclass(frozen=True)
class AnswerLoss:
    """An attack's loss: the verifier's cross-entropy of the true answers among their alternatives."""

    verifier: Verifier
    texts: Texts

    def __call__(self, features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        return -self.verifier.log_p(features, self.texts.rows(rows), victim.image_tokens(rows))


def fit_verifier(
    verifier: Verifier,
    space: PixelSpace,
    batches: Iterator[Mapping[str, Tensor]],
    steps: int,
    threat: ThreatModel,
    *,
    inner_steps: int = INNER_STEPS,
    learning_rate: float = 2e-3,
    train_tower: bool = False,
    seed: int = 0,
    on_step: Callable[[int, float, float], None] | None = None,
) -> None:
    """Trains the verifier's network, then with `train_tower` its tower too: `steps` batches, after twice as many clean
    ones.

    The loss is InfoNCE of the true answers against their alternatives, half on clean images, half on images that
    maximise it in the ball (PGD; eps rises over the first tenth). Both are left in evaluation mode, frozen.

    What is asked is learnt on the clean batches, which cost a tenth: on easy-VQA 300 batches of both alone, without
    them, read 31% of wrong answers as wrong at 5% false rejections.

    Args:
        batches: as `VQACollator(processor, statements=...)` makes them.
        inner_steps: of the attack; 0 trains on clean images alone.
        on_step: called with (batch, clean loss, adversarial loss) after each of the 3 * `steps` batches.

    Raises:
        ValueError: `train_tower` without a tower of its own: it would change the model.
    """
    if train_tower and verifier.tower is None:
        raise ValueError("train_tower is set, and the verifier reads the model's own features; give it a tower")
    network = verifier.network
    vision = list(verifier.bridge.vision_parameters) if train_tower else []
    learning = [*network.parameters(), *vision]
    try:
        for p in learning:
            p.requires_grad_(True)
        # Muon on the tower's matrices ended at a higher adversarial loss: 0.67 against 0.61 after 100 batches.
        optimizer = torch.optim.AdamW(learning, learning_rate, weight_decay=0.0)
        first = 2 * steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=max(first + steps, 1), pct_start=0.1, cycle_momentum=False,
            anneal_strategy="linear",
        )  # fmt: skip
        for step in range(-first, steps):
            batch = next(batches)
            victim, texts = Victim(verifier.bridge, space, batch), verifier.read(batch)
            clean = victim.pixels()
            images = [victim.space.to_model(clean)]
            if inner_steps and step >= 0:
                ball = ThreatModel(threat.norm, threat.eps * min(1.0, 10 * (step + 1) / steps))
                images.append(inconsistent(verifier, victim, texts, clean, ball, inner_steps, seed + step).model_input)
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


def inconsistent(
    verifier: Verifier,
    victim: Victim,
    texts: Texts,
    clean: Tensor,
    ball: ThreatModel,
    steps: int,
    seed: int,
    sample_ids: Tensor | None = None,
) -> InnerResult:
    """Images in the ball with the least S_c that PGD finds; the language model does not run."""
    loss = AnswerLoss(verifier, texts.detached())
    with frozen(verifier.network):
        return climbed(victim, clean, ball, loss, Exact(judge=False), step_sizes(ball.eps, steps), seed, sample_ids)


def _loss(verifier: Verifier, victim: Victim, texts: Texts, model_input: Tensor, train_tower: bool) -> Tensor:
    with torch.set_grad_enabled(train_tower):
        features = victim.encode(model_input)
    return AnswerLoss(verifier, texts)(features, victim.outputs(features), victim, None).mean()
