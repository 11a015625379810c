"""ROUGE-L of captions.

Our own implementation: `bleu.py` says why.
"""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.metrics.captions import tokenized
from cmai_fast.metrics.metric import metric

_BETA = 1.2  # of the official caption evaluation


@metric("rouge-l")
def rouge_l(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """ROUGE-L of captions, mean over samples, in [0, 1]: by the longest common subsequence."""
    scores = rouge_l_scores(predictions, references)
    return sum(scores) / len(scores)


def rouge_l_scores(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> list[float]:
    """ROUGE-L of each sample (Lin, 2004, equations 2 to 4, with beta = 1.2).

        F = (1 + beta^2) P R / (R + beta^2 P)

    P and R are the length of the longest common subsequence over that of the prediction and of the reference, each the
    highest of all references.

    Raises:
        ValueError: no predictions, or a sample without references.
    """
    return [_score(p, known) for p, known in zip(*tokenized(predictions, references), strict=True)]


def _score(prediction: str, known: tuple[str, ...]) -> float:
    said = prediction.split(" ")  # an empty caption counts as one empty word
    pairs = [(_common(said, words), len(words)) for words in (r.split(" ") for r in known)]
    precision = max(common for common, _ in pairs) / len(said)
    recall = max(common / length for common, length in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        corner = 0
        for i, with_word in enumerate(other, 1):
            corner, row[i] = row[i], corner + 1 if word == with_word else max(row[i], row[i - 1])
    return row[-1]
