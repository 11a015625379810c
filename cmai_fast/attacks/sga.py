"""Set-level guidance attack (Lu et al., 2023) on dual encoders: all captions and several sizes of an image at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gradients import Course, Estimate, exact_gradient, gradient_through
from cmai_fast.attacks.joint import Joint, captions_of, check_joint
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.substitution import rules
from cmai_fast.attacks.victim import Evaluation, Outputs, Victim
from cmai_fast.threat import ThreatModel

SCALES = (0.5, 0.75, 1.25, 1.5)


def resized(pixels: Tensor, scale: float) -> Tensor:
    """Images (n, C, H, W) resized by `scale` and back, bicubic."""
    small = F.interpolate(pixels, scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(small, size=pixels.shape[-2:], mode="bicubic", antialias=True)


@dataclass(frozen=True)
class OverScales:
    """The sum of the gradients at the image and at the image resized by each of `SCALES` and back."""

    def start(self, course: Course) -> Estimate:
        victim, loss = course.victim, course.loss

        def estimate(model_input: Tensor, rows: Tensor | None, step: int) -> tuple[Tensor, Evaluation | None]:
            grad, found = exact_gradient(victim, model_input, rows, loss)
            for scale in SCALES:
                grad = grad + gradient_through(victim, model_input, partial(resized, scale=scale), rows, loss)
            return grad, found

        return estimate


@attack("sga", label="SGA", steps=10, text=True, refuse=partial(check_joint, "sga"))
def sga(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    edits: int = 1,
    readable: bool = True,
    keep: str = "",
    candidates: int = 10,
    scales: bool = True,
) -> AttackResult:
    """Captions away from the image, the image away from all of its changed captions at several sizes, and the captions
    again, away from the changed image (section 4, equations 3 to 5; cosine similarity).

    Args:
        steps: of the image.
        edits, readable, keep, candidates: as of `co-attack`.
        scales: whether the image's gradient is summed over its sizes (0.5, 0.75, 1.25, 1.5 and 1).
    """
    joint = Joint(victim, captions_of(victim), rules(edits, readable, keep, candidates), seed)

    def away_from_image(features: Tensor, rows: Tensor, text: Tensor) -> Tensor:
        return -F.cosine_similarity(features.squeeze(1), text, dim=-1)

    def away_from_captions(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        return joint.mean(lambda at, text: -F.cosine_similarity(at, text, dim=-1), features.squeeze(1), rows)

    with joint.running(clean, sample_ids):
        joint.reword(away_from_image)
        joint.move(
            threat, away_from_captions, steps=steps, restarts=restarts, gradient=OverScales() if scales else None
        )
        joint.reword(away_from_image)
        return joint.result()
