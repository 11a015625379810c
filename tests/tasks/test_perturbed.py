from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmai_fast.data import Sample
from cmai_fast.tasks.perturbed import perturbed
from cmai_fast.tasks.retrieval import wrong_captions


def test_one_word_is_exchanged_for_another_of_its_kind():
    found = perturbed("A dog on a red couch")
    assert "A cat on a red couch" in found and "A dog on a blue couch" in found and "A dog on a red bed" in found
    assert "A dog on an orange couch" in found and "An elephant on a red couch" in found
    assert perturbed("Two dogs.")[0] == "One dogs." and perturbed("Dog")[0] == "Cat"
    assert perturbed("An orange")[0] == "A black"
    assert perturbed("") == perturbed("hello there") == ()


@given(st.text(st.sampled_from("a dog red.,An two "), max_size=30))
def test_none_says_the_same(caption):
    found = perturbed(caption)
    assert caption not in found and len(set(found)) == len(found) and perturbed(caption) == found


@pytest.mark.parametrize(
    ("sample", "wrong"),
    [
        (Sample(0, (), "", ("a red circle",), ("a red circle", "a blue circle")), ("a blue circle",)),
        (Sample(0, (), "", ("a cat",)), ("a house", "a dog")),
    ],
)
def test_wrong_captions_are_choices_or_those_of_others_and_perturbed(sample, wrong):
    others = [Sample(1, (), "", ("A cat.",)), Sample(2, (), "", ("a house", "a cat"))]
    assert wrong_captions(sample, others)[: len(wrong)] == wrong


def test_without_others_they_are_perturbed():
    alone = Sample(0, (), "", ("a red circle", "a blue circle"))
    found = wrong_captions(alone, [alone])
    assert "a teal circle" in found and "a blue circle" not in found
