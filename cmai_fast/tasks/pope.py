"""POPE: whether an object is in an image, yes or no, as a measure of object hallucination."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.data.sample import Sample
from cmai_fast.metrics.exact_match import folded
from cmai_fast.metrics.pope_f1 import pope_scores, says_yes
from cmai_fast.tasks.task import briefly, task


@task
class Pope:
    """An answer is a no if "No", "no" or "not" is a word of its first sentence, and else a yes, as in the official
    program: "Yes, there is a dog" is right where `vqa` wants "yes" alone."""

    name = "pope"
    label = "Object hallucination"
    metric_names: tuple[str, ...] = ("pope-f1",)
    broken_below = 1.0

    def prompt(self, sample: Sample) -> str:
        return briefly(sample.prompt)

    def score(self, prediction: str, sample: Sample) -> float:
        return float(says_yes(prediction) == (_label(sample) == "yes"))

    def metrics(self, predictions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """`pope-f1`, `accuracy`, `precision` and `recall` of the answer yes, and `yes-ratio`, the share of yes."""
        found = pope_scores(predictions, [(_label(s),) for s in samples])
        return {"pope-f1": found.pop("f1"), "yes-ratio": found.pop("yes_ratio")} | found

    def wrong_answers(self, sample: Sample, others: Sequence[Sample] = ()) -> tuple[str, ...]:
        return ("no",) if _label(sample) == "yes" else ("yes",)


def _label(sample: Sample) -> str:
    label = folded(sample.answer)
    if label not in ("yes", "no"):
        raise ValueError(f"{sample.name} has the answer {sample.answer!r:.80}; expected yes or no (or the task vqa)")
    return label
