"""BLEU of captions; `bleu_1.py` to `bleu_4.py` register it as `bleu-1` to `bleu-4`.

Our own implementation, because the one of pycocoevalcap prints to the standard output, comes with pycocotools,
and says in its file that it is not for commercial use. The values are equal to it (docs/metrics.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from cmai_fast.metrics.captions import ngrams, tokenized

ORDERS = 4
_SMALL, _TINY = 1e-9, 1e-15  # no division by zero, and no logarithm of it; part of the official values


def bleu(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of the corpus, in [0, 1] (Papineni et al., 2002, equations 1 to 3, with uniform weights).

        BLEU-N = min(1, exp(1 - r / c)) * (p_1 ... p_N)^(1/N)

    p_n is the share of the predicted n-grams that are in a reference, each counted at most as often as in the
    reference that has most of it; c is the number of predicted words, r that of the references nearest in length, over
    all samples.

    Raises:
        ValueError: no predictions, or a sample without references.
    """
    matched, possible = [0] * ORDERS, [0] * ORDERS
    predicted = wanted = 0
    for prediction, known in zip(*tokenized(predictions, references), strict=True):
        length = len(prediction.split())
        predicted += length
        wanted += min((len(r.split()) for r in known), key=lambda n: (abs(n - length), n))
        counts = [ngrams(r, ORDERS) for r in known]
        for n, found in enumerate(ngrams(prediction, ORDERS)):
            most: Counter[tuple[str, ...]] = Counter()
            for count in counts:
                most |= count[n]
            matched[n] += (found & most).total()
            possible[n] += max(0, length - n)
    ratio = (predicted + _TINY) / (wanted + _SMALL)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (matched[n] + _TINY) / (possible[n] + _SMALL)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores[0], scores[1], scores[2], scores[3]
