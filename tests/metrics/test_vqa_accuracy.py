"""VQA accuracy against values of the official evaluation and of lmms-eval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmai_fast.metrics import METRICS, measure
from cmai_fast.metrics.vqa_accuracy import normalized, vqa_score

# Prediction, the answers of ten people, and the scores of vqaEval.py (GT-Vision-Lab/VQA, a013f00) and of lmms-eval's
# vqav2_process_results.
CASES = [
    ("Red", {"red": 10}, 0.0, 1),
    ("a cat", {"cat": 10}, 0.0, 1),
    ("cat", {"a cat": 10}, 0.0, 1),
    ("red", {"red": 10}, 1.0, 1),
    (" red\n", {"red": 10}, 1.0, 1),
    ("Red", {"red": 9, "blue": 1}, 1.0, 1),
    ("No", {"no": 9, "No": 1}, 1.0, 1),
    ("red", {"red": 3, "blue": 7}, 0.9, 0.9),
    ("red", {"red": 2, "blue": 8}, 0.6, 0.6),
    ("red", {"red": 1, "blue": 9}, 0.3, 0.3),
    ("red", {"blue": 10}, 0.0, 0.0),
    ("Two", {"2": 5, "two": 3, "three": 2}, 1.0, 1),
    ("none", {"0": 3, "1": 7}, 0.9, 0.9),
    ("the dog.", {"dog": 6, "a dog": 4}, 1.0, 1),
    ("a", {"a": 4, "the": 6}, 1.0, 1),
    ("dont know", {"don't know": 4, "no": 6}, 1.0, 1),
    ("somebody'd", {"somebodyd": 4, "x": 6}, 1.0, 1),
    ("couldnt've", {"couldn't've": 4, "x": 6}, 1.0, 1),
    ("cat's", {"cats": 4, "cat's": 6}, 1.0, 1),
    ("10,000", {"10000": 4, "ten": 6}, 1.0, 1),
    ("10 000", {"10,000": 4, "no": 6}, 0.0, 0.0),
    ("1,,2", {"12": 4, "1": 6}, 0.0, 1),
    ("3.5", {"3.5": 4, "3": 6}, 1.0, 1),
    ("u.s.", {"us": 5, "usa": 5}, 1.0, 1),
    ("blue-green", {"blue green": 4, "blue": 6}, 1.0, 1),
    ("yes, sir", {"yes sir": 4, "yes": 6}, 1.0, 1),
    ("yes,sir", {"yes sir": 4, "yes": 6}, 1.0, 1),
    ("w/o", {"w o": 4, "without": 6}, 1.0, 1),
]


def people(counts):
    return tuple(answer for answer, n in counts.items() for _ in range(n))


@pytest.mark.parametrize("prediction, counts, official, lmms", CASES)
def test_scores_are_those_of_the_two_official_programs(prediction, counts, official, lmms):
    assert vqa_score(prediction, people(counts)) == pytest.approx(official, abs=1e-9)
    assert vqa_score(prediction, people(counts), scorer="lmms-eval") == pytest.approx(lmms, abs=1e-9)


def test_the_metrics_are_means_over_samples():
    predictions, references = [p for p, *_ in CASES], [people(c) for _, c, *_ in CASES]
    assert measure(["vqa-accuracy", "vqa-accuracy-lmms"], predictions, references) == pytest.approx(
        {
            "vqa-accuracy": sum(c[2] for c in CASES) / len(CASES),
            "vqa-accuracy-lmms": sum(c[3] for c in CASES) / len(CASES),
        }
    )


@given(
    st.sampled_from(["red", "a red", "blue", "2", "x"]),
    st.lists(st.sampled_from(["red", "blue", "two"]), min_size=10, max_size=10),
)
def test_the_score_depends_on_the_number_of_matches_only(prediction, answers):
    same = sum(normalized(a) == normalized(prediction) for a in answers)
    expected = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}.get(same, 1.0)
    assert vqa_score(prediction, answers, "lmms-eval") == pytest.approx(expected)
    assert vqa_score(prediction, answers[::-1]) == pytest.approx(vqa_score(prediction, answers))
    if len(set(answers)) > 1:
        assert vqa_score(prediction, answers) == pytest.approx(expected)


def test_more_than_32_full_stops_stay():
    assert normalized("." * 40) == "." * 8  # the official code does this


@pytest.mark.parametrize("references", [(), ("red",), ("red",) * 3, "red red red red"])
def test_too_few_answers_are_refused(references):
    with pytest.raises(ValueError, match=r"expected the answers of all people \(ten in VQA v2\).* use exact-match"):
        vqa_score("red", references)


def test_an_unknown_scorer_is_refused():
    with pytest.raises(ValueError, match="unknown scorer 'mine' of VQA accuracy; expected one of official, lmms-eval"):
        vqa_score("red", ("red",) * 10, scorer="mine")
    assert {"vqa-accuracy", "vqa-accuracy-lmms"} <= {*METRICS}
