"""The image-scaling attack (Xiao et al., 2019): a picture that shows another one once the processor shrinks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.state import AttackResult, Tally, prepare
from cmai_fast.attacks.unbounded import uploads, visible
from cmai_fast.attacks.upload import UploadVictim
from cmai_fast.attacks.victim import Victim
from cmai_fast.data.pictures import read_picture
from cmai_fast.threat import ThreatModel

_NEAR = 1.0  # levels: a view that differs no more than rounding does is the target's
_PROBE = 0.1  # of the range: a first step that is far above rounding to 8 bits, for the curvature


def _refuse(picture: str = "") -> None:
    if not picture:
        raise ValueError("scaling: there is no picture to show; name a file (--set picture=FILE)")
    if not Path(picture).expanduser().is_file():
        raise ValueError(f"scaling: picture is {picture!r}; expected a picture file")


@attack("scaling", label="Image scaling", steps=100, threats=("linf",), unbounded=True, refuse=_refuse)
def scaling(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    picture: str = "",
) -> AttackResult:
    """Minimises |P(x + delta) - P(b)|^2 over delta in the box, P being the processor and b the target picture, resized
    to the uploaded one. The descent starts at delta = 0 and follows P's own gradients, so it stays where P looks: the
    delta that it finds is about the smallest in the Euclidean norm (exactly, where the box does not cut).

    Steps are those of Barzilai and Borwein (1988), per sample, and the nearest view so far is kept. `details` has
    `view_mean` and `view_max`, the distance of the model's view from that of the target in 8-bit levels, and how
    visible the change is (`unbounded.visible`). `fooled` is the verdict on the result; nothing drives towards it. Each
    step is a pass of the processor, none of the model; the verdict is one.

    Args:
        picture: a file with the target.

    Raises:
        ValueError: the victim is no upload; no target; several restarts.
    """
    _refuse(picture)
    upload = uploads(victim, "scaling")
    if restarts != 1:
        raise ValueError(f"scaling: restarts is {restarts}, and nothing is random; expected 1 (and more steps)")
    clean, _, _ = prepare(victim, clean, threat, sample_ids)
    with victim.counted(), torch.inference_mode(False), victim.attack_mode():
        with torch.no_grad():
            goal = upload.units(_resized(upload, picture).to(clean))
        adv = _nearest(upload, clean, goal, steps)
        adv = torch.round(adv * 255) / 255
        model_input = victim.space.to_model(adv)
        with torch.no_grad():
            at = victim(model_input)
            apart = _levels(upload.units(adv), goal)
        details = {"view_mean": apart.mean(1).tolist(), "view_max": apart.amax(1).tolist()}
        details |= visible(upload, clean, adv)
        tally = Tally(victim, clean)
        return AttackResult(
            adv, ~at.right, -apart.mean(1).to(clean), victim.passes, tally.nonfinite, tally.zero_gradients,
            model_input, details=details,
        )  # fmt: skip


def _resized(victim: UploadVictim, picture: str) -> Tensor:
    """The target in the size of each uploaded picture, as images of the victim."""
    target = Image.fromarray(np.asarray(read_picture(picture, picture)))
    return victim.from_pictures(
        [
            [np.asarray(target.resize(own.shape[1::-1])) for own in several]
            for several in victim.pictures(victim.pixels())
        ]
    )


def _levels(view: Tensor, goal: Tensor) -> Tensor:
    """(N, pixels)"""
    return (view - goal).abs().flatten(1) * 255


def _nearest(victim: UploadVictim, clean: Tensor, goal: Tensor, steps: int) -> Tensor:
    """Projected gradient descent from the clean images."""

    def at(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            view = victim.units(leaf)
            (grad,) = torch.autograd.grad(0.5 * (view - goal).square().sum(), leaf)
        apart = _levels(view.detach(), goal)
        return grad, apart.square().sum(1), apart.amax(1)

    per_row = (-1,) + (1,) * (clean.dim() - 1)
    x, best = clean.clone(), clean.clone()
    grad, error, most = at(x)
    least = error.clone()
    length = grad.flatten(1).abs().amax(1).clamp_min(1e-12)
    other = (x - grad * (_PROBE / length).view(per_row)).clamp(0, 1)
    step = _curved(other - x, at(other)[0] - grad, 1 / length)
    for _ in range(steps):
        if bool((most <= _NEAR).all()):
            break
        moved = (x - grad * step.view(per_row)).clamp(0, 1)
        moved = torch.where((most <= _NEAR).view(per_row), x, moved)
        after, error, most_after = at(moved)
        step = _curved(moved - x, after - grad, step)
        x, grad, most = moved, after, most_after
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better.view(per_row), x, best)
    return best


def _curved(moved: Tensor, change: Tensor, otherwise: Tensor) -> Tensor:
    """The step (N,) of Barzilai and Borwein: |s|^2 / <s, y>, y being the change of the gradient along s."""
    along = (moved * change).flatten(1).sum(1)
    return torch.where(along > 0, moved.square().flatten(1).sum(1) / along.clamp_min(1e-20), otherwise)
