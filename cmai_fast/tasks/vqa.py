"""Question answering: the whole answer has to equal one of the references."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.data.sample import Sample
from cmai_fast.metrics import measure
from cmai_fast.metrics.exact_match import folded
from cmai_fast.tasks.choices import other_answers
from cmai_fast.tasks.task import task


@task
class VQA:
    """An answer is right if it equals a reference, ignoring case, extra spaces and the mark at the end."""

    name = "vqa"
    label = "Question answering"
    metric_names: tuple[str, ...] = ("exact-match",)
    broken_below = 1.0

    def prompt(self, sample: Sample) -> str:
        return sample.prompt

    def score(self, prediction: str, sample: Sample) -> float:
        return float(folded(prediction) in {folded(r) for r in sample.references})

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        return measure(self.metric_names, predictions, [s.references for s in samples])

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        if not sample.choices:
            return other_answers(sample, others)
        return sample.wrong_choices
