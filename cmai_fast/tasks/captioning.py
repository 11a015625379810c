"""Captioning."""

from __future__ import annotations

from cmai_fast.data.sample import Sample
from cmai_fast.tasks.task import task


@task
class Captioning:
    name = "captioning"
    label = "Captioning"
    metric_names: tuple[str, ...] = ()
    broken_below = 0.1

    def prompt(self, sample: Sample) -> str:
        return "Provide a one-sentence caption for the provided image."

    def score(self, prediction: str, sample: Sample) -> float:
        return float(prediction.strip() in sample.references)

    def wrong_answers(self, sample, others=()):
        return sample.wrong_choices

    def metrics(self, predictions, samples):
        return {}
