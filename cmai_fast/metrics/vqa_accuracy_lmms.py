"""VQA accuracy as lmms-eval counts it."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.metrics.metric import metric
from cmai_fast.metrics.vqa_accuracy import mean_score


@metric("vqa-accuracy-lmms")
def vqa_accuracy_lmms(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """VQA accuracy of lmms-eval, in [0, 1]: unlike the official one it normalises answers also where people agree."""
    return mean_score(predictions, references, "lmms-eval")
