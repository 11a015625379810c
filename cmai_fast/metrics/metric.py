"""What a metric is, and the registry of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cmai_fast.registry import Registry

Metric = Callable[[Sequence[str], Sequence[tuple[str, ...]]], float]
M = TypeVar("M", bound=Metric)

_OTHER = "accuracy bleu captions consistency detection interval java_scorers metric ptb ptb_words retrieval".split()
METRICS: Registry[Metric] = Registry("metric", "cmai_fast.metrics", frozenset(_OTHER))


def metric(name: str) -> Callable[[M], M]:
    """Registers `function(predictions, references) -> float`: per sample, one text and its right answers."""

    def register(function: M) -> M:
        METRICS.add(name, function)
        return function

    return register


def measure(
    names: Iterable[str], predictions: Sequence[str], references: Sequence[tuple[str, ...]]
) -> dict[str, float]:
    """Each metric of these predictions, by name.

    Raises:
        ValueError: an unknown metric, no predictions, a different number of references, or a sample without references.
    """
    chosen = {name: METRICS[name] for name in names}
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} samples; expected one per sample")
    for i, right in enumerate(references):
        if not right:
            raise ValueError(f"sample {i} of {len(references)} has no references; expected at least one right answer")
    return {name: float(function(predictions, references)) for name, function in chosen.items()}
