"""Clean image, perturbation and adversarial image side by side, with the models' answers, for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cmai_fast.bridge import BatchImages
from cmai_fast.data import Sample
from cmai_fast.evaluation.answers import Attacked
from cmai_fast.evaluation.protocol import Measured
from cmai_fast.evaluation.surface import shown as shown_to_model
from cmai_fast.pipeline import Pipeline
from cmai_fast.pixels import round_to_8bit
from cmai_fast.threat import Surface, ThreatModel


@dataclass
class Shown:
    """One attacked sample to be shown: its images in [0, 1], the adversarial one rounded to 8 bits."""

    sample: Sample
    clean: Tensor
    adversarial: Tensor
    surface: Surface = field(default_factory=Surface)
    record: dict[str, Any] = field(default_factory=dict)

    def ask(self, name: str, pipeline: Pipeline) -> None:
        """Adds the answers of the model `name` to both images."""
        images = [self.clean, self.adversarial]
        clean, adversarial = pipeline.generate(*shown_to_model([self.sample] * 2, images, self.surface))
        self.record["answers"][name] = {"clean": clean, "adversarial": adversarial}


def shown(name: str, measured: Measured, attack: str, threat: ThreatModel, most: int = 6) -> list[Shown]:
    """Up to `most` samples of the attacked model `name`, broken ones first; up to half are wrong answers that its guard
    accepts, if it has one.

    `attack` is the key of the attack whose images are shown, rounded to 8 bits; the runner has kept them.
    """
    runner, attacked, found = measured.runner, measured.attacked[attack], []
    threshold, accepted = runner.pipeline.threshold, {}
    if threshold is not None and attacked.scores is not None:
        accepted = dict(zip(attacked.rows, (attacked.scores >= threshold.tau).tolist(), strict=True))
    for row in _rows(attacked, most, accepted):
        sample, batch = runner.samples[row], runner.batch([row])
        (clean,) = runner.images([row])
        adv = round_to_8bit(attacked.images[row][None], clean[None], threat)[0]
        amplification = 0.5 / max(float((adv - clean).abs().max()), 1 / 255)
        record = {
            "question": sample.prompt,
            "answer": sample.answer,
            "against": name,
            "amplification": round(amplification, 1),
            "clean_png": _png(batch, clean),
            "perturbation_png": _png(batch, 0.5 + (adv - clean) * amplification),
            "adversarial_png": _png(batch, adv),
            "answers": {},
        }
        if row in accepted:
            record["accepted"] = accepted[row]
        found.append(Shown(sample, clean, adv, runner.surface, record))
    return found


def _rows(attacked: Attacked, most: int, accepted: Mapping[int, bool]) -> list[int]:
    """Broken samples before unbroken ones, spread over the data set; only samples whose clean answer is right."""
    rows = np.array(attacked.rows, dtype=int)
    broken, held = rows[~attacked.right], rows[attacked.right]
    passed = [int(row) for row in broken if accepted.get(int(row))]
    first = [passed[i] for i in np.unique(np.linspace(0, len(passed) - 1, min(most // 2, len(passed))).astype(int))]
    broken, most = np.setdiff1d(broken, first), most - len(first)
    spread: Sequence[np.ndarray] = [
        group[np.linspace(0, len(group) - 1, min(most, len(group))).astype(int)] for group in (broken, held)
    ]
    chosen = np.unique(spread[0])
    if len(chosen) < most:
        chosen = np.concatenate([chosen, np.unique(spread[1])[: most - len(chosen)]])
    return first + [int(i) for i in chosen[:most]]


def _png(batch: BatchImages, image: Tensor) -> str:
    """The picture of one sample as the attack changes it; several pictures or tiles side by side."""
    (pictures,) = batch.pictures(batch.join([image.clamp(0, 1)]))
    tallest = max(len(picture) for picture in pictures)
    level = [np.pad(p, ((0, tallest - len(p)), (0, 0), (0, 0)), constant_values=255) for p in pictures]
    buffer = io.BytesIO()
    Image.fromarray(np.hstack(level)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
