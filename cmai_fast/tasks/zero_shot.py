"""Zero-shot classification by a dual encoder: the class whose prompt is nearest to the image (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cmai_fast.data.sample import Sample
from cmai_fast.metrics import measure
from cmai_fast.metrics.exact_match import folded
from cmai_fast.tasks.choices import other_answers
from cmai_fast.tasks.task import task

TEMPLATE = "a photo of a {}."


@task
class ZeroShot:
    """The right answer is the class name; the texts are those of `TEMPLATE`, one per class."""

    name = "zero-shot"
    label = "Zero-shot classification"
    metric_names: tuple[str, ...] = ("exact-match",)
    broken_below = 1.0

    def prompt(self, sample: Sample) -> str:
        return ""

    def posed(self, sample: Sample) -> Sample:
        return replace(
            sample,
            prompt="",
            references=tuple(TEMPLATE.format(name) for name in sample.references),
            choices=tuple(TEMPLATE.format(name) for name in sample.choices),
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return float(folded(prediction) in {folded(r) for r in sample.references})

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        return measure(self.metric_names, predictions, [s.references for s in samples])

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        return sample.wrong_choices or other_answers(sample, others)
