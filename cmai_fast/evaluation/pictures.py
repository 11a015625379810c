"""Clean image, perturbation and adversarial image side by side, with what the models answer: for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cmai_fast.bridge import BatchImages
from cmai_fast.data import Sample
from cmai_fast.evaluation.protocol import Attacked, Measured
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel, round_to_8bit


def picture_grid(
    subjects: dict[str, Pipeline],
    measured: dict[str, Measured],
    samples: Sequence[Sample],
    attack: str,
    threat: ThreatModel,
    most: int = 6,
) -> list[dict[str, Any]]:
    """Up to `most` samples for each attacked model: those that its attack broke first.

    `subjects` and `measured` go by `undefended` / `immunised`; `attack` is the key of the attack whose images, rounded
    to 8 bits, are shown.
    """
    pictures = []
    for against, m in measured.items():
        attacked = m.attacked[attack]
        for row in _rows(m, attacked, most):
            sample, clean = samples[row], m.clean[row]
            adv = round_to_8bit(attacked.adv[row][None], clean[None], threat)[0]
            amplification = 0.5 / max(float((adv - clean).abs().max()), 1 / 255)
            answers = {
                key: {
                    "clean": subject.generate([sample], [clean])[0],
                    "adversarial": subject.generate([sample], [adv])[0],
                }
                for key, subject in subjects.items()
            }
            objective = subjects[against].images([sample])
            pictures.append(
                {
                    "question": sample.prompt,
                    "answer": sample.answer,
                    "against": against,
                    "amplification": round(amplification, 1),
                    "clean_png": _png(objective, clean),
                    "perturbation_png": _png(objective, 0.5 + (adv - clean) * amplification),
                    "adversarial_png": _png(objective, adv),
                    **answers,
                }
            )
    return pictures


def _rows(measured: Measured, attacked: Attacked, most: int) -> list[int]:
    """Broken samples before unbroken ones, spread over the data set; none that was wrong when untouched."""
    right = np.flatnonzero(measured.clean_right)
    broken = right[~attacked.right[right]]
    held = right[attacked.right[right]]
    spread = [group[np.linspace(0, len(group) - 1, min(most, len(group))).astype(int)] for group in (broken, held)]
    chosen = np.unique(spread[0])
    if len(chosen) < most:
        chosen = np.concatenate([chosen, np.unique(spread[1])[: most - len(chosen)]])
    return [int(i) for i in chosen[:most]]


def _png(objective: BatchImages, image: Tensor) -> str:
    """The picture of one sample as the model sees it; its tiles side by side where it is cut into tiles."""
    (pictures,) = objective.pictures(objective.join([image.clamp(0, 1)]))
    buffer = io.BytesIO()
    Image.fromarray(np.hstack(pictures)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
