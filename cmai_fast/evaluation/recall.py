"""R@1, R@5 and R@10 between images and texts, both ways, clean and with attacked images in the gallery."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmai_fast.data.choices import ChoiceCollator
from cmai_fast.evaluation.parts import Parts
from cmai_fast.metrics.exact_match import folded

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
    """Recall at 1, 5 and 10 of similarities (images, texts): the share of images for which one of the K nearest texts
    is `relevant` (images, texts), and of texts for which one of the K nearest images is.

    With five captions per image of COCO and Flickr30k this is the usual definition (Karpathy and Fei-Fei, 2015).
    """
    found: dict[str, float] = {}
    for way, scores, right in (("image-to-text", similarity, relevant), ("text-to-image", similarity.T, relevant.T)):
        asked = right.any(1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        hits = right.gather(1, order)[asked]
        found |= {f"{way} R@{k}": float(hits[:, :k].any(1).float().mean()) for k in KS}
    return found
