"""SPICE of captions, by the official Java program."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.metrics.java_scorers import java_score
from cmai_fast.metrics.metric import metric


@metric("spice")
def spice(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """SPICE of captions, in [0, 1]; needs Java and the extra `captions`."""
    return java_score("spice", predictions, references)
