"""The tokenizer against the answers of the original, which ptb_golden.json holds (make_ptb_golden.py makes it)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmai_fast.metrics.ptb import PUNCTUATION, PTBTokenizer, tokenize, tokenize_all

GOLDEN = json.loads(Path(__file__).with_name("ptb_golden.json").read_text(encoding="utf-8"))["parts"]


@pytest.mark.parametrize("part", GOLDEN, ids=[part["name"] for part in GOLDEN])
def test_tokens_are_those_of_the_original(part):
    captions, expected = zip(*part["cases"], strict=True)
    wrong = [
        (c, want, got) for c, want, got in zip(captions, expected, tokenize_all(captions), strict=True) if want != got
    ]
    assert len(captions) > 40 and wrong == []


def test_a_caption_alone():
    assert tokenize("The dog's owner can't come (at 5 p.m.).") == "the dog 's owner ca n't come -lrb- at 5 p.m. -rrb-"
    assert tokenize("") == tokenize(" \n ") == tokenize("...") == tokenize("\U0001f600") == ""
    assert tokenize("two\nlines\r\nhere") == "two lines here"
    assert tokenize("1 1/2 cups") == "1\u00a01/2 cups"


def test_the_next_caption_decides_whether_an_abbreviation_ends_a_sentence():
    assert tokenize_all(["like an X.", "The dog", "like an X.", "two dogs"]) == [
        "like an x", "the dog", "like an x.", "two dogs",
    ]  # fmt: skip
    assert tokenize_all(["no.", "5 dogs", "no.", "dogs"]) == ["no.", "5 dogs", "no", "dogs"]


def test_it_takes_the_place_of_the_tokenizer_of_pycocoevalcap():
    captions = {7: [{"caption": "A dog."}, {"caption": "Cannot see it"}], "b": [{"caption": "!"}], "none": []}
    assert PTBTokenizer().tokenize(captions) == {7: ["a dog", "can not see it"], "b": [""]}


hard = st.lists(
    st.sampled_from([*"aZ5 .,'\u2019\"-/&;:()<>@#_\n\u00ad\u00a0é\U0001f600", "n't", "U.S.", "http://", "no."])
).map("".join)


@given(st.lists(st.one_of(st.text(), hard), max_size=4))
@settings(deadline=None, max_examples=50)
def test_every_text_has_tokens(captions):
    lines = tokenize_all(captions)
    assert len(lines) == len(captions)
    for line in lines:
        tokens = line.split(" ") if line else []
        assert not PUNCTUATION & set(tokens) and "" not in tokens and "\n" not in line
        assert line == line.lower()
