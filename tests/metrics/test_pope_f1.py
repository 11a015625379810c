from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from cmai_fast.metrics import measure
from cmai_fast.metrics.pope_f1 import pope_scores, says_yes


@pytest.mark.parametrize(
    "answer, yes",
    [("Yes", True), ("no", False), ("No, there is none.", False), ("There is not a dog. Yes", False), ("", True),
     ("NO", True), ("no!", True), ("A dog. No cat", True), ("I do not know", False), ("nothing", True)],
)  # fmt: skip
def test_an_answer_is_no_as_in_the_official_code(answer, yes):
    assert says_yes(answer) is yes


def test_scores_are_those_of_the_official_program():
    """Printed by `evaluate.py` of github.com/AoiDragon/POPE (08d957b) for these answers."""
    said = ["Yes", "Yes, there is a dog.", "No", "There is not. Yes", "no dog", "NO", "a dog", "I do not know",
            "Nothing, no.", "Yes. No"]  # fmt: skip
    truth = [(label,) for label in ("yes", "yes", "no", "yes", "no", "no", "yes", "no", "no", "no")]
    assert pope_scores(said, truth) == {
        "accuracy": 0.7, "precision": 0.6, "recall": 0.75, "f1": 0.6666666666666665, "yes_ratio": 0.5
    }  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_scores_agree_with_sklearn(pairs):
    said, truth = zip(*pairs, strict=True)
    predictions = ["Yes, it is." if y else "No" for y in said]
    references = [("yes",) if t else ("No ",) for t in truth]
    scores = pope_scores(predictions, references)
    assert scores == pytest.approx({
        "accuracy": sk.accuracy_score(truth, said),
        "precision": sk.precision_score(truth, said, zero_division=0),
        "recall": sk.recall_score(truth, said, zero_division=0),
        "f1": sk.f1_score(truth, said, zero_division=0),
        "yes_ratio": sum(said) / len(said),
    })  # fmt: skip
    assert measure(["pope-f1"], predictions, references) == {"pope-f1": scores["f1"]}


@pytest.mark.parametrize("predictions, references", [([], []), (["yes"], [("maybe",)]), (["yes"], [()]), (["a"], [])])
def test_other_references_are_refused(predictions, references):
    with pytest.raises(ValueError, match="expected"):
        pope_scores(predictions, references)
