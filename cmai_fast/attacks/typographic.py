"""The typographic attack (Goh et al., 2021): a label with a text is put on the picture; no gradients."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.crossfire import rendered
from cmai_fast.attacks.losses import Loss
from cmai_fast.attacks.restarts import Restart, restarted
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.unbounded import uploads, visible
from cmai_fast.attacks.upload import UploadVictim
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel

# Height and width of a label as shares of the picture's, and its place: 0 at the top and left, 1 at the other edge.
# First a band over the whole width, then half-wide labels in the corners and the middle, then half of the picture.
PLACES = (
    (0.25, 1.0, 1.0, 0.5), (0.25, 1.0, 0.0, 0.5), (0.25, 1.0, 0.5, 0.5),
    (0.25, 0.5, 1.0, 1.0), (0.25, 0.5, 0.0, 0.0), (0.25, 0.5, 1.0, 0.0), (0.25, 0.5, 0.0, 1.0), (0.25, 0.5, 0.5, 0.5),
    (0.5, 1.0, 1.0, 0.5), (0.5, 1.0, 0.0, 0.5),
)  # fmt: skip

# Samples share texts and sizes, and a label of 640 x 240 takes 170 ms to draw, as large as the text fits.
_drawn = lru_cache(maxsize=256)(rendered)


def _refuse(text: str = "") -> None:
    if text and not text.strip():
        raise ValueError(f"typographic: text is {text!r}; expected a text to write, or none: other answers are tried")


@attack("typographic", label="Typographic", steps=100, threats=("linf",), unbounded=True, refuse=_refuse)
def typographic(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None = None,
    text: str = "",
) -> AttackResult:
    """Puts a white label with a text in black on each uploaded picture, and asks the model; the first one that fools it
    is kept, else the one with the highest loss. Nothing bounds the change, and nothing is drawn at random.

    Args:
        steps: the most labels per sample; each costs one query, and the clean picture one more. A label is a text at
            one of `PLACES`; all texts are tried at the first place, then at the next.
        text: what is written. By default the target of a targeted attack, else every other answer of the sample: its
            choices or, for a dual encoder, the texts to choose from.

    Raises:
        ValueError: the victim is no upload; several restarts; no text, and a sample without choices.
    """
    upload = uploads(victim, "typographic")
    if restarts != 1:
        raise ValueError(f"typographic: restarts is {restarts}, and nothing is random; expected 1 (and more steps)")
    labels = [_labels(upload, row, text)[:steps] for row in range(len(upload))]
    written = [""] * len(upload)
    result = restarted(
        lambda run: _search(run, upload, labels, written),
        victim, clean, threat, restarts=1, seed=seed, sample_ids=sample_ids, loss=loss, gradient=None, early_stop=True,
    )  # fmt: skip
    result.details = {"text": written, **visible(upload, clean, result.adv)}
    return result


def _labels(victim: UploadVictim, row: int, text: str) -> list[tuple[tuple[float, ...], str]]:
    sample = victim.samples[row]
    texts = [text] if text else [sample.answer] if victim.targeted else victim.other_texts(row)
    if not texts:
        raise ValueError(
            f"{sample.name} has no other answers to write on its picture; give a text (--set text=...), or records "
            "with choices"
        )
    return list(product(PLACES, texts))


def _search(
    run: Restart, victim: UploadVictim, labels: list[list[tuple[tuple[float, ...], str]]], written: list[str]
) -> None:
    own = victim.pictures(run.clean)
    rows = run.rows
    for query in range(max(map(len, labels), default=0)):
        rows = torch.tensor([i for i in rows.tolist() if query < len(labels[i])], dtype=torch.long, device=rows.device)
        if not len(rows):
            return
        asked = set(rows.tolist())
        pictures = [
            [labelled(picture, *labels[i][query]) for picture in several] if i in asked else several
            for i, several in enumerate(own)
        ]
        adv = victim.from_pictures(pictures).to(run.clean)[rows]
        model_input = victim.space.to_model(adv)
        with torch.no_grad():
            at = victim(model_input, rows, run.loss)
        before = run.best.loss[rows], run.best.fooled[rows]
        run.best.offer(adv, model_input, at, rows)
        for place, i in enumerate(rows.tolist()):
            if run.best.loss[i] != before[0][place] or run.best.fooled[i] != before[1][place]:
                written[i] = labels[i][query][1]
        rows = rows[at.right]


def labelled(picture: np.ndarray, place: tuple[float, ...], text: str) -> np.ndarray:
    """A copy of an 8-bit picture (H, W, 3) with a label: its height and width, and its place, as in `PLACES`."""
    shares, at = place[:2], place[2:]
    size = [max(1, round(share * length)) for share, length in zip(shares, picture.shape[:2], strict=True)]
    top, left = (round(x * (length - own)) for x, length, own in zip(at, picture.shape[:2], size, strict=True))
    found = picture.copy()
    found[top : top + size[0], left : left + size[1]] = _drawn(text, *size)
    return found
