"""Captions and statements that are made from easy-VQA's questions."""

from __future__ import annotations

from collections import Counter

import pytest

from cmai_fast.data.easyvqa import COLORS, SHAPES, EasyVQA
from cmai_fast.data.formats.easyvqa_captions import CAPTIONS
from cmai_fast.data.sources import DataSource


@pytest.fixture(scope="module")
def facts():
    return {k: (COLORS[c], SHAPES[s]) for k, (c, s) in EasyVQA("test").facts().items() if None not in (c, s)}


def test_captions_say_what_the_questions_reveal(facts):
    samples = DataSource("easyvqa-captions").load("test")
    assert {s.id: s.answer for s in samples} == {k: f"a {c} {s}" for k, (c, s) in facts.items()}
    assert len(samples) > 500 and all(s.choices == CAPTIONS and s.prompt == "" for s in samples)
    data = EasyVQA("test")
    for picture, question, answer in zip(data.image_ids, data.questions, data.answers, strict=True):
        assert question != "what color is the shape?" or facts.get(picture, (answer,))[0] == answer


def test_statements_are_true_of_half_of_their_pairs(facts):
    samples = DataSource("easyvqa-pairs").load("test")
    assert len(samples) == 800 and Counter(s.answer for s in samples) == {"true": 400, "false": 400}
    groups = {}
    for s in samples:
        groups.setdefault((s.id.split("-")[1], s.prompt), []).append(s)
    assert len(groups) == 200
    assert all(Counter(s.answer for s in own) == {"true": 2, "false": 2} for own in groups.values())
    again = DataSource("easyvqa-pairs").load("test")
    assert [(s.id, s.prompt, s.answer) for s in again] == [(s.id, s.prompt, s.answer) for s in samples]
    train = {s.id for s in DataSource("easyvqa-pairs").load("train", 50)}
    assert all(name.startswith("train-") for name in train)


def test_statements_mean_what_they_say(facts):
    data = EasyVQA("test")
    of = {data.picture(k).tobytes(): v for k, v in facts.items()}
    checked = Counter()
    for s in DataSource("easyvqa-pairs").load("test"):
        (c1, s1), (c2, s2) = (of[image.tobytes()] for image in s.images)
        words = s.prompt.rstrip(".").split()
        one = words[-2] if words[-1] == "shape" else words[-1]  # the colour or shape that is named last
        match words:
            case ["Both", *_]:
                truth = one in (c1, s1) and one in (c2, s2)
            case ["The", "images", *_]:
                truth = c1 == c2 if one == "color" or words[-1] == "color" else s1 == s2
            case ["At", *_]:
                truth = one in (c1, s1) or one in (c2, s2)
            case ["No", *_]:
                truth = one not in (c1, s1, c2, s2)
            case ["The", side, "image", "shows", "a", *rest] if "and" not in words:
                own = (c1, s1) if side == "left" else (c2, s2)
                truth = all(word in own for word in rest if word != "shape")
            case _:
                left, right = s.prompt.rstrip(".").split(" and ")
                named = [t.removesuffix(" shape").split()[-1] for t in (left, right)]
                truth = named[0] in (c1, s1) and named[1] in (c2, s2)
        assert s.answer == str(bool(truth)).lower(), s
        checked[words[0]] += 1
    assert all(checked[kind] for kind in ("Both", "The", "At", "No"))


@pytest.mark.parametrize("name", ["easyvqa-captions", "easyvqa-pairs"])
def test_keys_are_fixed(name):
    with pytest.raises(ValueError, match="fixed keys"):
        DataSource(name, fields={"question": "text"}).check()
