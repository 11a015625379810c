"""Exact match: the share of predictions that equal a reference but for case, extra spaces and the mark at the end."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.metrics.metric import metric


@metric("exact-match")
def exact_match(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """In [0, 1]; at least one prediction, and one or more references for each."""
    right = [folded(p) in {folded(r) for r in known} for p, known in zip(predictions, references, strict=True)]
    return sum(right) / len(right)


def folded(text: str) -> str:
    """The text as it is compared: case-folded, with single spaces, without ".", "!" or "?" at the end."""
    text = " ".join(text.casefold().split())
    return text.rstrip(" .!?") or text
