"""BLEU-3 of captions, over the whole corpus."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.metrics.bleu import bleu
from cmai_fast.metrics.metric import metric


@metric("bleu-3")
def bleu_3(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """BLEU-3 of captions, over the whole corpus, in [0, 1]."""
    return bleu(predictions, references)[2]
