"""VQAv2 in its official files."""

from __future__ import annotations

from collections import Counter

import pytest

import official_files as official
from cmai_fast.data.sources import DataSource

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def test_questions_have_their_ten_answers_and_the_majority_in_front(tmp_path):
    source = DataSource(f"vqav2:{official.vqav2(tmp_path)}")
    source.check(answers=True, images=True)
    samples = source.load("test")
    assert [s.id for s in samples] == [42000, 42001, 73000]
    first = samples[0]
    assert first.images == (str(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"),)
    assert (first.prompt, first.answer, first.choices) == ("What color is it?", "maroon", ())
    assert first.references == (
        "maroon",
        "red",
        "red",
        "dark red",
        "red",
        "maroon",
        "maroon",
        "maroon",
        "red",
        "maroon",
    )
    assert Counter(first.references) == Counter(official.TEN)
    assert samples[1].references == ("yes",) * 9 + ("no",)
    assert first.where == f"{tmp_path / QUESTIONS} questions[0]"


@pytest.mark.parametrize("chosen", [None, "crimson", ""])
def test_without_a_usable_choice_the_most_frequent_answer_comes_first(chosen, tmp_path):
    official.vqav2(tmp_path)
    official.changed(
        tmp_path / ANNOTATIONS, lambda v: [a.update(multiple_choice_answer=chosen) for a in v["annotations"]]
    )
    assert [s.answer for s in DataSource(f"vqav2:{tmp_path}").load("test")] == ["maroon", "yes", "2"]


def test_an_empty_answer_among_ten_is_kept_for_the_scorer_but_not_in_front(tmp_path):
    official.vqav2(tmp_path)
    ten = [{"answer": a, "answer_id": 1} for a in ["", "", "", "a cat", "", "", "", "", "", ""]]
    official.changed(
        tmp_path / ANNOTATIONS, lambda v: v["annotations"][0].update(answers=ten, multiple_choice_answer="")
    )
    last = DataSource(f"vqav2:{tmp_path}").load("test")[-1]
    assert last.references == ("a cat", *[""] * 9)


@pytest.mark.parametrize(
    "under, version, pictures",
    [
        ("annotations", "v2_", "images/val2014"),
        ("Questions", "", "Images/mscoco/val2014"),
        ("", "v2_", "mscoco/val2014"),
    ],
)
def test_other_places_and_the_names_of_version_1(under, version, pictures, tmp_path):
    official.vqav2(tmp_path, under=under, version=version)
    (tmp_path / pictures).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "val2014").rename(tmp_path / pictures)
    samples = DataSource(f"vqav2:{tmp_path}").load("test")
    assert len(samples) == 3 and samples[0].images[0].startswith(str(tmp_path / pictures))


def test_splits_have_their_own_names(tmp_path):
    for split in ("train2014", "val2014"):
        official.vqav2(tmp_path, split)
    official.vqav2(tmp_path, "test-dev2015", answers=False)
    source = DataSource(f"vqav2:{tmp_path}")
    source.check()  # train and calibration
    assert source.load("train")[0].images[0].endswith("train2014/COCO_train2014_000000000042.jpg")
    assert "val2014" in source.load("calibration")[0].images[0]
    with pytest.raises(
        ValueError, match=r" has test-dev2015, train2014, val2014, and no split 'test'\. .*--split NAME"
    ):
        source.load("test")
    hidden = DataSource(f"vqav2:{tmp_path}", split="test-dev2015")
    assert hidden.load("test")[0].images[0].endswith("test2015/COCO_test2015_000000000042.jpg")
    with pytest.raises(ValueError, match=r"3 of 3 samples have no answer: .*a split that has answers \(--split NAME\)"):
        hidden.check("test", answers=True)
    assert len(DataSource(f"vqav2:{tmp_path}", split="val2014").load("test")) == 3
    with pytest.raises(ValueError, match=r"val2014 is one set of records.*--split-seed N"):
        DataSource(f"vqav2:{tmp_path}", split="val2014").load("train")


def test_the_fingerprint_knows_questions_and_answers(tmp_path):
    source = DataSource(f"vqav2:{official.vqav2(tmp_path)}")
    seen = {source.fingerprint()}
    for name, key in ((QUESTIONS, "questions"), (ANNOTATIONS, "annotations")):
        official.changed(tmp_path / name, lambda v, key=key: v[key].reverse())
        seen.add(source.fingerprint())
    assert len(seen) == 3


def cut(path):
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


def without(key, i):
    return lambda path: official.changed(path, lambda v: v[key].pop(i))


def having(key, i, **values):
    return lambda path: official.changed(path, lambda v: v[key][i].update(values))


@pytest.mark.parametrize(
    "name, change, message",
    [
        (QUESTIONS, cut, r"questions\.json line 1 column \d+: not complete JSON \(.*get the file again"),
        (ANNOTATIONS, cut, r"annotations\.json line 1 column \d+: not complete JSON"),
        (ANNOTATIONS, lambda p: p.write_text(""), r"annotations\.json line 1 column 1: .* \(it is empty\)"),
        (QUESTIONS, lambda p: p.write_text("[]"), r"json has no list 'questions'; expected the official file"),
        (QUESTIONS, without("questions", 0), r"annotations\[2\]: question_id 42000 is not in .*questions\.json"),
        (
            ANNOTATIONS,
            without("annotations", 0),
            r"1 of 3 questions have no annotation in .*annotations\.json; the first is question_id 73000 "
            r"\(.*questions\[2\]\)",
        ),
        (ANNOTATIONS, lambda p: p.unlink(), r"expected v2_mscoco_val2014_annotations\.json in the same folder or"),
        (ANNOTATIONS, having("annotations", 0, image_id=7), r"annotations\[0\]: image_id is 7; question 73000 .* 73"),
        (ANNOTATIONS, having("annotations", 1, question_id=73000), r"annotations\[1\]: question_id 73000 has a second"),
        (QUESTIONS, having("questions", 2, question_id=42001), r"questions\[2\]: question_id 42001 is also .*\[1\]"),
        (QUESTIONS, having("questions", 1, question=" "), r"questions\[1\]: question is ' '; expected a text"),
        (QUESTIONS, having("questions", 1, image_id="42"), r"questions\[1\]: image_id is '42'; expected a whole"),
        (ANNOTATIONS, having("annotations", 0, answers=[]), r"annotations\[0\] .*73000\): all 0 answers are empty"),
        (ANNOTATIONS, having("annotations", 0, answers=[3]), r"answers is \[3\]; expected a list of texts"),
        (ANNOTATIONS, lambda p: official.write(p, {"annotations": [{"question_id": 1}]}), r"\[0\] has no .*answers"),
    ],
)  # fmt: skip
def test_bad_files_are_named(name, change, message, tmp_path):
    official.vqav2(tmp_path)
    change(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        DataSource(f"vqav2:{tmp_path}").check("test")


def test_an_image_id_without_a_file_is_named(tmp_path):
    official.vqav2(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").unlink()
    with pytest.raises(
        ValueError,
        match=r"^1 of 2 pictures are missing, and 2 of 3 samples need them: .*000042\.jpg \(.*questions\[0\]\)",
    ):
        DataSource(f"vqav2:{tmp_path}").check()


def test_two_files_of_one_split_and_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds nothing; expected files such as v2_OpenEnded_mscoco_val2014_ques"):
        DataSource(f"vqav2:{tmp_path}").check()
    official.vqav2(tmp_path)
    official.vqav2(tmp_path, under="questions", version="")
    with pytest.raises(ValueError, match=r"are both the split val2014; keep one"):
        DataSource(f"vqav2:{tmp_path}").check()
    with pytest.raises(ValueError, match=r"vqav2 has fixed keys; leave out --map answer="):
        DataSource(f"vqav2:{official.vqav2(tmp_path / 'more')}", {"answer": "label"}).check()
