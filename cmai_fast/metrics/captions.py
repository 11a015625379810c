"""What the caption metrics share: tokens of predictions and references, and n-grams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from cmai_fast.metrics.ptb import tokenize_all


def tokenized(
    predictions: Sequence[str], references: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Tokens of each prediction and of the references of each, joined by spaces, as the official evaluation gets them.

    Raises:
        ValueError: no predictions, a different number of references, or a sample without references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} samples; expected one per sample")
    for i, known in enumerate(references):
        if not known or isinstance(known, str):
            raise ValueError(f"sample {i} has the references {known!r}; expected one or more captions")
    lines = iter(_tokens(tuple(caption for known in references for caption in known)))
    return _tokens(tuple(predictions)), tuple(tuple(next(lines) for _ in known) for known in references)


@lru_cache(maxsize=8)  # BLEU, ROUGE-L and CIDEr of the same captions follow each other
def _tokens(captions: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(tokenize_all(captions))


def ngrams(tokens: str, longest: int = 4) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram of n = 1 ... `longest` words is in the tokens, one counter per n."""
    words = tokens.split()  # also at no-break spaces, as the official scorers do
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, longest + 1)]
