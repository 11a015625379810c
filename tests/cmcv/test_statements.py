"""What a data set says of each picture: every question about it, balanced, and answers to compare with."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.cmcv.statements import Statements, balanced
from cmai_fast.data import Sample

YES_NO, COLOURS = ("no", "yes"), ("red", "blue", "teal", "green")
PICTURES = [np.full((4, 4, 3), i, dtype=np.uint8) for i in range(3)]


def sample(i, picture, prompt, answer, choices):
    return Sample(i, (PICTURES[picture],), prompt, (answer,), choices)


@pytest.fixture
def samples():
    found = [sample(picture, picture, "what color?", COLOURS[picture], COLOURS) for picture in range(3)]
    asked = [(0, "red", "yes"), (0, "blue", "no"), (1, "red", "no"), (2, "red", "no"), (2, "teal", "yes")]
    return found + [sample(10 + i, p, f"is it {c}?", a, YES_NO) for i, (p, c, a) in enumerate(asked)]


def test_it_says_all_that_is_known_of_a_picture_and_nothing_of_others(samples):
    statements = Statements(samples, Alternatives.of(samples))
    first, *others = statements(samples[0])
    assert first[0] == "what color?" and first[1][0] == "red"
    assert {(q, a[0]) for q, a in others} == {("is it red?", "yes"), ("is it blue?", "no")}
    assert [q for q, _ in statements(samples[1])] == ["what color?", "is it red?"]
    for question, (right, *wrong) in statements(samples[0]):
        near = set(COLOURS if question.startswith("what") else YES_NO) - {right}
        assert near <= set(wrong) and len(wrong) == len(near) + 1 and right not in wrong, "all near, one far"


def test_a_draw_depends_on_seed_and_sample_alone(samples):
    alternatives = Alternatives.of(samples)
    same = [Statements(order, alternatives, most=2)(samples[0]) for order in (samples, samples[::-1])]
    assert same[0][0] == same[1][0] and len(same[0]) == 2
    again = Statements(samples, alternatives, most=2)
    assert again(samples[0]) == same[0] == again(samples[0])
    drawn = {Statements(samples, alternatives, most=2, seed=seed)(samples[0])[1][0] for seed in range(20)}
    assert drawn == {"is it red?", "is it blue?"}
    assert len(Statements(samples, alternatives, most=1)(samples[0])) == 1


def test_files_are_known_by_path_and_pictures_by_content(samples, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PICTURES[0]).save(path)
    by_file = [
        Sample(i, (image,), q, ("yes",), YES_NO) for i, (image, q) in enumerate([(path, "a?"), (str(path), "b?")])
    ]
    assert [q for q, _ in Statements(by_file, Alternatives((YES_NO,)))(by_file[0])] == ["a?", "b?"]
    copy = Sample(99, (PICTURES[0].copy(),), "new?", ("no",), YES_NO)
    assert len(Statements(samples, Alternatives.of(samples))(copy)) == 4, "its own, which the data do not have, first"


def test_answers_to_one_question_are_equally_frequent():
    said = [("is it?", "no", YES_NO)] * 7 + [("is it?", "yes", YES_NO)] + [("what?", c, COLOURS) for c in COLOURS]
    total = Counter()
    for (question, answer, _), weight in zip(said, balanced(said), strict=True):
        total[question, answer] += weight
    assert total["is it?", "no"] == pytest.approx(total["is it?", "yes"])
    kinds = (
        sum(v for (q, _), v in total.items() if q == "is it?"),
        sum(v for (q, _), v in total.items() if q == "what?"),
    )
    assert kinds[0] / kinds[1] == pytest.approx((8 / 4) ** 0.5)


def test_a_sample_without_an_answer_is_named():
    with pytest.raises(ValueError, match="sample 7 has no answer"):
        Statements([Sample(7, (), "q?")], Alternatives((YES_NO,)))
