"""Records as people have them, and what is wrong with some."""

from __future__ import annotations

import base64
import io
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmai_fast.data import Sample
from cmai_fast.data.records import sample_of


def png(colour: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


PICTURE = Image.new("RGB", (4, 4))
PNG = png()
BASE64 = base64.b64encode(PNG).decode()
INLINE = {"bytes": PNG, "path": None}
ASKED = {"question": "what?"}


def test_a_record_of_easyvqas_form():
    array = np.zeros((4, 4, 3), np.uint8)
    record = {"image": array, "question": "what color?", "answer": "red", "choices": ("red", "blue"), "sample_id": 7}
    assert Sample.of(record) == Sample(7, (array,), "what color?", ("red",), ("red", "blue"))
    assert Sample.of({**ASKED}, 5) == Sample(5, (), "what?")
    sample = Sample("a", (), "b")
    assert Sample.of(sample) is sample


@pytest.mark.parametrize(
    "value, image",
    [
        ("a/b.png", "/data/a/b.png"),
        (Path("b.png"), "/data/b.png"),
        ("/x/b.png", "/x/b.png"),
        (f"data:image/png;base64,{BASE64}", INLINE),
        (BASE64, INLINE),
        (base64.encodebytes(PNG).decode(), INLINE),  # with line breaks
        (PNG, INLINE),
        ({"bytes": PNG, "path": None}, INLINE),
        ({"bytes": PNG, "path": "b.png"}, {"bytes": PNG, "path": "b.png"}),
        ({"bytes": None, "path": "b.png"}, "/data/b.png"),
        (PICTURE, PICTURE),
    ],
)
def test_pictures_of_every_form(value, image):
    for record in ({"image": value}, {"images": [value]}, {"image": [value]}, {"file_name": value}):
        assert sample_of(record | ASKED, "f line 1", 0, Path("/data")).images == (image,)


def test_base64_of_a_jpeg_is_no_path():
    file = io.BytesIO()
    PICTURE.save(file, "JPEG")
    text = base64.b64encode(file.getvalue()).decode()
    assert text.startswith("/9j/")
    assert Sample.of({"image": text} | ASKED).images == ({"bytes": file.getvalue(), "path": None},)


def test_none_one_and_several_pictures_and_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert sample_of({"image": "~/a.png"} | ASKED, "f", 0, Path("/d")).images == ("/home/ann/a.png",)
    assert sample_of({"images": ["a.png", "b.png"]} | ASKED, "f", 0, Path("/d")).images == ("/d/a.png", "/d/b.png")
    for none in ({}, {"image": None}, {"images": []}):
        assert Sample.of(none | ASKED).images == ()


@pytest.mark.parametrize(
    "image, message",
    [
        ("https://x.org/a.png", r"record 3 \(sample 'x'\): image is the URL 'https://x.org/a.png'; nothing is downl"),
        ("", "image is ''; expected the path"),
        ("data:image/svg+xml,<svg/>", "image is a data URL 'data:image/svg"),
        (f"data:image/png;base64,{BASE64[:-3]}", "base64 that cannot be decoded"),
        (b"", "has the bytes b''"),
        ({"bytes": None, "path": None}, 'keys bytes, path; expected "bytes" or "path"'),
        (3, r"image is 3 \(int\); expected a path"),
        ([[0, 1], [2, 3]], "image is a list of numbers"),
        (["a.png", None], r"image\[1\] is None"),
    ],
)
def test_what_is_no_picture_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        Sample.of({"id": "x", "image": image} | ASKED, 3)


@pytest.mark.parametrize("key", ["photo", "file"])
@pytest.mark.parametrize("value", ["cat.JPG", {"bytes": PNG, "path": None}, PICTURE])
def test_a_picture_under_an_unknown_key_is_not_dropped(key, value):
    with pytest.raises(ValueError, match=f"no image, but {key} is .* --map image={key}"):
        Sample.of({key: value} | ASKED)
    assert Sample.of({key: value, "image": "a.png"} | ASKED).images == ("a.png",)


@pytest.mark.parametrize(
    "record, references",
    [
        ({"answer": "red"}, ("red",)),
        ({"answer": 3}, ("3",)),
        ({"answer": 0.5}, ("0.5",)),
        ({"answer": Decimal("1.50")}, ("1.50",)),
        ({"answer": np.int64(4)}, ("4",)),
        ({"answer": True}, ("yes",)),
        ({"answer": False}, ("no",)),
        ({"answer": ["red", "dark red"]}, ("red", "dark red")),
        ({"answers": ["a", "a", "b"]}, ("a", "a", "b")),  # scorers count repeated ones
        ({"answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}]}, ("a", "b")),
        ({"answer": "b", "answers": ["a", "b", "b"]}, ("b", "a", "b")),
        ({"answer": "red", "answers": None}, ("red",)),  # rows of a table have all keys
        ({"completion": "red"}, ("red",)),
        ({"caption": "a cat", "answer": "red"}, ("red",)),
        ({}, ()),
    ],
)
def test_answers_of_every_form(record, references):
    assert Sample.of(record | ASKED).references == references


def test_a_caption_needs_no_question():
    assert Sample.of({"image": PICTURE, "caption": "a cat"}) == Sample(0, (PICTURE,), "", ("a cat",))


@pytest.mark.parametrize("key", ["answer", "answers", "caption", "completion"])
@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), [], [None], {"text": "a"}, [["a"]]])
def test_an_answer_that_is_none_is_named(key, value):
    with pytest.raises(ValueError, match=rf"^my\.jsonl line 4 \(sample 'q7'\): {key}.*expected"):
        sample_of({"id": "q7", key: value} | ASKED, "my.jsonl line 4", 0)


def test_choices_hold_the_answer():
    record = {"choices": ["Yes", {"text": "no"}, 3]} | ASKED
    assert Sample.of(record | {"answer": "yes"}).choices == ("Yes", "no", "3")
    with pytest.raises(ValueError, match=r"the answer '1' is not among the choices 'Yes'.*not its number"):
        Sample.of(record | {"answer": 1})
    with pytest.raises(ValueError, match=r"choices is 'a\|b'; expected a list"):
        Sample.of({"choices": "a|b"} | ASKED)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "what?", "label": 1}, r"no question; .* its keys are text, label\. Other names: --map question=KEY"),
        ({"question": None}, "question is empty"),
        ({"question": " "}, "question is ' '; expected a text"),
        ({"prompt": 5}, "prompt is 5"),
        ({"question": "a", "prompt": "b"}, "found both question and prompt"),
        (
            {"image": PICTURE, "images": [PICTURE], **ASKED},
            "found both image and images; choose one: --map image=KEY",
        ),
        ({"id": [1], **ASKED}, r"id is \[1\] \(list\)"),
        ({"id": float("nan"), **ASKED}, "id is nan"),
        ("what?", "record 0 is 'what\\?'; expected a record"),
    ],
)
def test_a_record_without_its_parts_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        Sample.of(record)


@pytest.mark.parametrize("own", ["x", ("a", 1), 2**70, np.int64(9), np.str_("x")])
def test_any_hashable_id(own):
    assert Sample.of({"id": own} | ASKED).id == own


def test_other_names():
    record = {"text": "what?", "label": "red", "answer": "wrong", "pic": "a.png", "n": 4}
    fields = {"question": "text", "answer": "label", "image": "pic", "id": "n"}
    assert sample_of(record, "f", 0, None, fields) == Sample(4, ("a.png",), "what?", ("red",))
    with pytest.raises(ValueError, match=r"no key 'txt', which --map question=txt names; its keys are text, label"):
        sample_of(record, "f", 0, None, {"question": "txt"})
    both = {"question": "q", "answer": "a", "messages": [{"role": "user", "content": "m"}]}
    assert sample_of(both, "f", 0, None, {"question": "question"}).prompt == "q"
    assert sample_of(both, "f", 0, None, {"messages": "messages"}) == Sample(0, (), "m")
    with pytest.raises(ValueError, match="both messages and question"):
        sample_of(both, "f", 0)


def test_pictures_in_a_column_each_are_joined():
    row = {"left": "a.png", "right": "b.png", "question": "?", "x+y": ["c.png"]}
    assert sample_of(row, "x", 0, None, {"images": "left+right"}).images == ("a.png", "b.png")
    assert sample_of(row, "x", 0, None, {"images": "x+y"}).images == ("c.png",)
    with pytest.raises(ValueError, match=r"no key 'rihgt', which --map images=left\+rihgt names; its keys are left"):
        sample_of(row, "x", 0, None, {"images": "left+rihgt"})
    with pytest.raises(ValueError, match=r"no key 'left\+right', which --map question=left\+right names"):
        sample_of(row, "x", 0, None, {"question": "left+right"})
