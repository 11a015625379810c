"""R@1, R@5 and R@10 between images and texts, both ways, clean and with attacked images in the gallery."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmai_fast.data.choices import ChoiceCollator
from cmai_fast.evaluation.parts import Parts
from cmai_fast.metrics.exact_match import folded
from cmai_fast.metrics.retrieval import DIRECTIONS, recall_at

if TYPE_CHECKING:
    from cmai_fast.evaluation.protocol import Measured

KS = (1, 5, 10)


def recall(measured: Measured, batch_size: int) -> dict[str, dict[str, float]]:
    """The metrics of `clean` images and of `robust` ones: of each sample, that of the first attack that breaks it, or
    of the last one.

    Raises:
        ValueError: the model generates its answers.
    """
    runner, pipeline = measured.runner, measured.runner.pipeline
    if not isinstance(pipeline.collate, ChoiceCollator):
        raise ValueError(
            f"{pipeline.name} generates its answers, and retrieval needs a dual encoder (CLIP, SigLIP); use the task "
            "captioning"
        )
    texts = pipeline.collate.texts or ()
    places = {folded(text): k for k, text in enumerate(texts)}
    relevant = torch.zeros(len(runner.samples), len(texts), dtype=torch.bool)
    for i, sample in enumerate(runner.samples):
        relevant[i, [places[folded(text)] for text in sample.references]] = True
    worst: dict[int, Tensor] = {}
    settled: set[int] = set()
    for attacked in measured.attacked.values():
        for row, right in zip(attacked.rows, attacked.right.tolist(), strict=True):
            if row not in settled:
                worst[row] = attacked.images[row]
            if not right:
                settled.add(row)

    def similarities(images: dict[int, Tensor] | None) -> Tensor:
        def part(rows: list[int]) -> Tensor:
            samples = [runner.samples[i] for i in rows]
            own = None if images is None else [images[i] for i in rows]
            return pipeline.similarities(samples, own).float().cpu()

        return torch.cat([found for _, found in Parts(batch_size).over(range(len(runner.samples)), part)])

    return {
        "clean": recalls(similarities(None), relevant),
        "robust": recalls(similarities(worst) if measured.attacked else similarities(None), relevant),
    }


def recalls(similarity: Tensor, relevant: Tensor) -> dict[str, float]:
    """`recall_at` of similarities (images, texts) for K = 1, 5, 10, both ways; `relevant` (images, texts) bool."""
    return {f"{way} R@{k}": recall_at(similarity, relevant, k, way) for way in DIRECTIONS for k in KS}
