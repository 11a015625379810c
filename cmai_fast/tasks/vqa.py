"""Question answering where the whole answer has to be one of the references."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.data.sample import Sample
from cmai_fast.tasks.task import task


@task
class VQA:
    """An answer is right if it equals a reference, upper and lower case and space aside."""

    name = "vqa"
    label = "Question answering"
    broken_below = 1.0

    def prompt(self, sample: Sample) -> str:
        return sample.prompt

    def score(self, prediction: str, sample: Sample) -> float:
        return float(_folded(prediction) in {_folded(r) for r in sample.references})

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        scores = [self.score(p, s) for p, s in zip(predictions, samples, strict=True)]
        return {"exact_match": sum(scores) / len(scores)} if scores else {}

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        right = {_folded(r) for r in sample.references}
        pool = sample.choices or tuple(dict.fromkeys(o.answer for o in others if o.references))
        return tuple(c for c in pool if _folded(c) not in right)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
