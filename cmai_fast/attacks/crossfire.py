"""CrossFire (arXiv 2409.06793): the image's features turn to those of a picture or text that the attacker chooses."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gradients import Gradient
from cmai_fast.attacks.pgd import pgd
from cmai_fast.attacks.state import AttackResult, prepare
from cmai_fast.attacks.victim import Outputs, Victim
from cmai_fast.data.pictures import read_picture
from cmai_fast.threat import ThreatModel


def rendered(text: str, height: int, width: int) -> np.ndarray:
    """A text in black on white, as large as it fits: (height, width, 3) uint8."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for size in range(height, 0, -1):
        font = ImageFont.load_default(size)
        letters = max(1, int(width / max(draw.textlength("n", font), 1)))
        lines = "\n".join(textwrap.wrap(text, letters, break_long_words=size < 8) or [""])
        left, top, right, bottom = draw.textbbox((0, 0), lines, font)
        if right - left <= width and bottom - top <= height:
            break
    draw.text(((width - right - left) / 2, (height - bottom - top) / 2), lines, "black", font)
    return np.asarray(picture)


def _refuse(text: str = "", picture: str = "") -> None:
    if bool(text.strip()) == bool(picture):
        raise ValueError(
            f"crossfire: text is {text!r} and picture is {picture!r}; name one target (--set text=..., which is "
            "rendered, or --set picture=FILE)"
        )
    if picture and not Path(picture).is_file():
        raise ValueError(f"crossfire: picture is {picture!r}; expected a picture file")


@attack("crossfire", label="CrossFire", steps=100, refuse=_refuse)
def crossfire(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    gradient: str | Gradient | None = None,
    text: str = "",
    picture: str = "",
) -> AttackResult:
    """Maximises cos(h_v(x + delta), h_v(target)), features of all image tokens in one vector, by PGD.

    A target text is brought into the image's modality: it is rendered as a picture of the image's size. The consistency
    of image and target rises, where MBAT's adversary lowers that of image and answer.

    Args:
        text: the target, to be rendered.
        picture: a file with the target, in place of a text; it is resized to the image's size.

    Raises:
        ValueError: no target, or two; a model that reads several images, tiles or patches per sample.
    """
    _refuse(text, picture)
    if clean.dim() != 4:
        raise ValueError(
            f"{type(victim.bridge.model).__name__} reads a sample as {tuple(clean.shape[1:])}, and crossfire takes one "
            "image per sample; use another attack (pgd with the loss feature-distance)"
        )
    height, width = clean.shape[-2:]
    if picture:
        pixels = np.asarray(Image.fromarray(np.asarray(read_picture(picture, picture))).resize((width, height)))
    else:
        pixels = rendered(text, height, width)
    target = torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(clean) / 255

    with victim.attack_mode(), torch.no_grad():
        checked, _, _ = prepare(victim, clean, threat, sample_ids)
        goal = victim.encode(victim.space.to_model(target.to(checked).expand_as(checked).contiguous())).flatten(1)
    victim.passes.vision_forward += 1

    def towards(features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        return F.cosine_similarity(features.flatten(1), goal if rows is None else goal[rows], dim=1)

    return pgd(
        victim, clean, threat, steps=steps, restarts=restarts, seed=seed, sample_ids=sample_ids, loss=towards,
        gradient=gradient,
    )  # fmt: skip
