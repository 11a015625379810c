"""CIDEr of captions: the variant CIDEr-D, which the COCO evaluation reports as CIDEr.

Our own implementation: `bleu.py` says why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from cmai_fast.metrics.captions import ngrams, tokenized
from cmai_fast.metrics.metric import metric

_SIGMA = 6.0
_ORDERS = 4
_Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]


@metric("cider")
def cider(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """CIDEr of captions, mean over samples, 0 to 10; the references of all samples give the weights of words."""
    scores = cider_scores(predictions, references)
    return sum(scores) / len(scores)


def cider_scores(
    predictions: Sequence[str],
    references: Sequence[tuple[str, ...]],
    corpus: Sequence[tuple[str, ...]] | None = None,
) -> list[float]:
    """CIDEr-D of each sample, 0 to 10 (Vedantam et al., 2015, equations 1 to 4).

    An n-gram weighs its count times log(M / m): M is the number of samples of the corpus, m how many of them have it in
    a reference. The score is ten times the mean, over n = 1 ... 4 and the references, of the cosine of the two weighted
    vectors, the prediction's clipped to the reference's, times exp(-d^2 / 72) for captions that differ by d words.

    Args:
        predictions: one caption per sample.
        references: the captions of each.
        corpus: the references of all samples of the data set, if `references` are only some of them, as in an attack
            that asks for the score of one sample. By default `references`; then a single sample scores 0, as in the
            official code, since its words are in all samples.

    Raises:
        ValueError: no predictions, or a sample without references.
    """
    said, known = tokenized(predictions, references)
    whole = known if corpus is None else tokenized([""] * len(corpus), corpus)[1]
    frequencies, samples = _frequencies(whole), math.log(len(whole))

    def vector(tokens: str) -> _Vector:
        weights = [
            {gram: count * (samples - math.log(max(1, frequencies[gram]))) for gram, count in counts.items()}
            for counts in ngrams(tokens, _ORDERS)
        ]
        # The official code takes the number of word pairs for the length, so one word is as long as none.
        norms = [math.sqrt(sum(w * w for w in part.values())) for part in weights]
        return weights, norms, max(0, len(tokens.split()) - 1)

    scores = []
    for prediction, captions in zip(said, known, strict=True):
        mine = vector(prediction)
        scores.append(10 * sum(_similarity(mine, vector(c)) for c in captions) / len(captions))
    return scores


def _similarity(mine: _Vector, other: _Vector) -> float:
    total = 0.0
    for weights, against, norm, other_norm in zip(mine[0], other[0], mine[1], other[1], strict=True):
        product = sum(min(w, against[gram]) * against[gram] for gram, w in weights.items() if gram in against)
        total += product / (norm * other_norm) if norm and other_norm else product
    return total / _ORDERS * math.exp(-((mine[2] - other[2]) ** 2) / (2 * _SIGMA**2))


@lru_cache(maxsize=2)
def _frequencies(corpus: tuple[tuple[str, ...], ...]) -> Counter[tuple[str, ...]]:
    """In how many samples each n-gram is."""
    found: Counter[tuple[str, ...]] = Counter()
    for captions in corpus:
        found.update({gram for caption in captions for counts in ngrams(caption, _ORDERS) for gram in counts})
    return found
