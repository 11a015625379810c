"""METEOR of captions, by the official Java program."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.metrics.java_scorers import java_score
from cmai_fast.metrics.metric import metric


@metric("meteor")
def meteor(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """METEOR of captions, in [0, 1]; needs Java and the extra `captions`."""
    return java_score("meteor", predictions, references)
