"""Captioning: a sentence about an image, scored by CIDEr against its captions."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.data.sample import ASK_CAPTION, Sample
from cmai_fast.metrics import measure
from cmai_fast.metrics.cider import cider_scores
from cmai_fast.tasks.retrieval import wrong_captions
from cmai_fast.tasks.task import task


@task
class Captioning:
    """A caption is broken if its CIDEr is below 0.1, which COCO's tables print as 10 (RobustVLM's rule for COCO:
    Schlarmann and Hein, 2023).

    Args:
        corpus: the captions of all samples, which say how much each word counts; `over` sets it.
    """

    name = "captioning"
    label = "Captioning"
    metric_names: tuple[str, ...] = ("bleu-1", "bleu-4", "rouge-l", "cider")
    broken_below = 0.1

    def __init__(self, corpus: tuple[tuple[str, ...], ...] = ()) -> None:
        self.corpus = corpus
        self._scores: dict[tuple[str, tuple[str, ...]], float] = {}  # the same text is judged several times

    def over(self, samples: Sequence[Sample]) -> Captioning:
        return Captioning(tuple(s.references for s in samples))

    def prompt(self, sample: Sample) -> str:
        return ASK_CAPTION

    def score(self, prediction: str, sample: Sample) -> float:
        if len(self.corpus) < 2:
            raise ValueError(
                f"captioning has the captions of {len(self.corpus)} samples, and CIDEr weighs words by those of all; "
                "expected at least 2 (task_over(task, samples), or a higher --limit)"
            )
        key = prediction, sample.references
        if key not in self._scores:
            self._scores[key] = cider_scores([prediction], [sample.references], self.corpus)[0]
        return self._scores[key]

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        return measure(self.metric_names, predictions, [s.references for s in samples])

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        return wrong_captions(sample, others)
