"""Metrics by name."""

from __future__ import annotations

import pytest

from cmai_fast.metrics import METRICS, measure, metric
from cmai_fast.metrics.exact_match import exact_match


def test_exact_match_is_found_by_name():
    assert "exact-match" in METRICS and not {"metric", "interval"} & {*METRICS}
    assert METRICS["exact-match"] is exact_match
    assert exact_match([" Red ", "two  cats", "x"], [("blue", "red"), ("Two cats",), ("y",)]) == 2 / 3
    with pytest.raises(ValueError, match=r"unknown metric 'exact_match'; did you mean exact-match\?"):
        measure(["exact_match"], ["a"], [("a",)])


def test_a_metric_is_one_function(monkeypatch):
    monkeypatch.setattr(METRICS, "_things", dict(METRICS._things))

    @metric("first-letter")
    def first_letter(predictions, references):
        return sum(p[:1] == r[0][:1] for p, r in zip(predictions, references, strict=True)) / len(predictions)

    assert measure(["first-letter", "exact-match"], ["ab"], [("ac",)]) == {"first-letter": 1.0, "exact-match": 0.0}


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([], [], "0 predictions for 0 samples"),
        (["a"], [("a",), ("b",)], "1 predictions for 2 samples"),
        (["a", "b"], [("a",), ()], "sample 1 of 2 has no references"),
    ],
)
def test_predictions_without_references_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        measure(["exact-match"], predictions, references)
