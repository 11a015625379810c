"""Reasoning over one or several images: whether a statement about them is true (NLVR, NLVR2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cmai_fast.data.sample import Sample
from cmai_fast.metrics.exact_match import folded
from cmai_fast.tasks.task import task

_TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}


@task
class Reasoning:
    """An answer is right if its first word, true or false (yes or no), is the label."""

    name = "reasoning"
    label = "Reasoning over images"
    metric_names: tuple[str, ...] = ()
    broken_below = 1.0

    def prompt(self, sample: Sample) -> str:
        return f"{sample.prompt} True or false?"

    def score(self, prediction: str, sample: Sample) -> float:
        return float(_truth(prediction) in {_truth(r) for r in sample.references} - {""})

    def metrics(self, predictions, samples):
        return {}

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        return ("false",) if _truth(sample.answer) == "true" else ("true",)


def _truth(text: str) -> str:
    """`true` or `false`; empty if the text starts with neither."""
    first = re.match(r"\w*", folded(text))
    return _TRUTH.get(first[0] if first else "", "")
