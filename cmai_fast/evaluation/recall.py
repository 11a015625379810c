"""R@1, R@5 and R@10 between images and texts, both ways, clean and with attacked images in the gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from cmai_fast.data.choices import ChoiceCollator, places_of
from cmai_fast.evaluation.answers import Attacked
from cmai_fast.evaluation.parts import Parts
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.surface import shown
from cmai_fast.metrics.exact_match import folded
from cmai_fast.metrics.retrieval import DIRECTIONS, recall_at

KS = (1, 5, 10)


def recall(
    runner: Runner, attacks: Sequence[tuple[Attacked, Mapping[int, Tensor]]], batch_size: int
) -> dict[str, dict[str, float]]:
    """The metrics of `clean` images and of `robust` ones: of each sample, that of the first attack that breaks it, or
    of the last one. `attacks`: verdicts, and the images by row."""
    pipeline = runner.pipeline
    assert isinstance(pipeline.collate, ChoiceCollator), "checked by the runner"
    texts = pipeline.collate.texts or ()
    places = places_of(texts)
    relevant = np.zeros((len(runner.samples), len(texts)), dtype=bool)
    for i, sample in enumerate(runner.samples):
        relevant[i, [k for text in sample.references for k in places.get(folded(text), ())]] = True
    worst: dict[int, Tensor] = {}
    settled: set[int] = set()
    for attacked, images in attacks:
        for row, right in zip(attacked.rows, attacked.right.tolist(), strict=True):
            if row not in settled and row in images:
                worst[row] = images[row]
            if not right:
                settled.add(row)

    def similarities(images: Mapping[int, Tensor]) -> np.ndarray:
        def part(rows: list[int]) -> np.ndarray:
            samples, own = [runner.samples[i] for i in rows], None
            if images:
                moved = [images[i] if i in images else runner.images([i])[0] for i in rows]
                samples, own = shown(samples, moved, runner.surface)
            return pipeline.similarities(samples, own).float().cpu().numpy()

        return np.concatenate([found for _, found in Parts(batch_size).over(range(len(runner.samples)), part)])

    return {"clean": recalls(similarities({}), relevant), "robust": recalls(similarities(worst), relevant)}


def recalls(similarity: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """`recall_at` of similarities (images, texts) for K = 1, 5, 10, both ways; `relevant` (images, texts) bool."""
    return {f"{way} R@{k}": recall_at(similarity, relevant, k, way) for way in DIRECTIONS for k in KS}
