"""Reasoning over one or several images: whether a statement about them is true (NLVR, NLVR2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cmai_fast.data.sample import Sample
from cmai_fast.metrics.consistency import consistency, nlvr2_sentence
from cmai_fast.metrics.exact_match import folded
from cmai_fast.tasks.task import task

_TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}
_IDENTIFIER = re.compile(r"\w+(-\d+){3}")


@task
class Reasoning:
    """An answer is right if its first word, true or false (or yes or no), is the label."""

    name = "reasoning"
    label = "Reasoning over images"
    metric_names: tuple[str, ...] = ()
    broken_below = 1.0

    def prompt(self, sample: Sample) -> str:
        return f"{sample.prompt} True or false?"

    def score(self, prediction: str, sample: Sample) -> float:
        return float(_truth(prediction) == _label(sample))

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """`accuracy` and, where the ids are NLVR2's identifiers, `consistency`: the share of sentences that are judged
        right for all of their images."""
        right = [self.score(p, s) == 1 for p, s in zip(predictions, samples, strict=True)]
        found = {"accuracy": sum(right) / len(right)}
        if all(isinstance(s.id, str) and _IDENTIFIER.fullmatch(s.id) for s in samples):
            found["consistency"] = consistency(right, [nlvr2_sentence(str(s.id)) for s in samples])
        return found

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        return ("false",) if _label(sample) == "true" else ("true",)


def _label(sample: Sample) -> str:
    label = _truth(sample.answer)
    if not label:
        raise ValueError(f"{sample.name} has the answer {sample.answer!r:.80}; expected true or false (or yes or no)")
    return label


def _truth(text: str) -> str:
    """`true` or `false`; empty if the text starts with neither."""
    first = re.match(r"\w*", folded(text))
    return _TRUTH.get(first[0] if first else "", "")
