"""F1 of POPE, the questions whether an object is in an image: answers are yes or no, and yes is the positive class."""

from __future__ import annotations

from collections.abc import Sequence

from cmai_fast.metrics.metric import metric


@metric("pope-f1")
def pope_f1(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """F1 of the answer yes, in [0, 1]; an answer with "no" or "not" in its first sentence is a no."""
    return pope_scores(predictions, references)["f1"]


def pope_scores(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """`accuracy`, `precision`, `recall`, `f1` and `yes_ratio`, each in [0, 1].

    Source: Li et al., 2023, and evaluate.py of github.com/AoiDragon/POPE. `yes_ratio` is the share of predictions
    that say yes. Where the official code divides by zero, the value is 0.

    Raises:
        ValueError: no predictions, or a first reference that is neither yes nor no.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} samples; expected one per sample")
    yes = [says_yes(p) for p in predictions]
    truth = []
    for i, known in enumerate(references):
        answer = known[0].strip().lower() if known else ""
        if answer not in ("yes", "no"):
            raise ValueError(f"sample {i} has the references {known!r}; expected yes or no")
        truth.append(answer == "yes")
    both = sum(y and t for y, t in zip(yes, truth, strict=True))
    precision, recall = (both / n if n else 0.0 for n in (sum(yes), sum(truth)))
    return {
        "accuracy": sum(y == t for y, t in zip(yes, truth, strict=True)) / len(yes),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes_ratio": sum(yes) / len(yes),
    }


def says_yes(answer: str) -> bool:
    """False if "No", "no" or "not" is a word of the first sentence, as in the official code; "NO" is no such word."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)
