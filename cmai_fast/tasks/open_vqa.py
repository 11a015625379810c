"""Open-ended question answering with the answers of ten people (VQAv2)."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.data.sample import Sample
from cmai_fast.metrics import measure
from cmai_fast.metrics.vqa_accuracy import vqa_score
from cmai_fast.tasks.choices import other_answers
from cmai_fast.tasks.task import briefly, task


@task
class OpenVQA:
    """An answer scores by how many people gave it, and is broken if none did (RobustVLM's rule: accuracy 0).

    It is judged normalised, as lmms-eval does: by the official scorer "Yes" is wrong against ten times "yes", so a
    capital would count as a broken answer. Both are reported.
    """

    name = "open-vqa"
    label = "Open-ended question answering"
    metric_names: tuple[str, ...] = ("vqa-accuracy", "vqa-accuracy-lmms")
    broken_below = 0.1  # a single match among ten answers scores 0.3

    def prompt(self, sample: Sample) -> str:
        return briefly(sample.prompt)

    def score(self, prediction: str, sample: Sample) -> float:
        try:
            return vqa_score(prediction, sample.references, "lmms-eval")
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error} (the task vqa)") from error

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        return measure(self.metric_names, predictions, [s.references for s in samples])

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        return sample.wrong_choices or other_answers(sample, others)
