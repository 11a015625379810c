"""POPE in its official files."""

from __future__ import annotations

import json

import pytest

import official_files as official
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource


@pytest.mark.parametrize("under", ["", "coco"])
@pytest.mark.parametrize("pictures", ["val2014", "images/val2014", "images"])
def test_a_question_is_closed(under, pictures, tmp_path):
    source = DataSource(f"pope:{official.pope(tmp_path, under=under, pictures=pictures)}")
    source.check("test", answers=True, images=True)
    samples = source.load("test")
    photo = str(tmp_path / pictures / "COCO_val2014_000000000042.jpg")
    assert len(samples) == 4
    assert samples[1] == Sample(2, (photo,), "Is there a car in the image?", ("no",), ("yes", "no"))
    assert samples[1].where == f"{tmp_path / under / 'coco_pope_random.json'} line 2"


def test_the_ways_of_sampling_are_splits(tmp_path):
    for split in ("random", "popular", "adversarial"):
        official.pope(tmp_path, split)
    name = f"pope:{tmp_path}"
    samples = DataSource(name, split="adversarial").load("test")
    assert samples[0].where.endswith("coco_pope_adversarial.json line 1")
    with pytest.raises(ValueError, match=r"has adversarial, popular, random, and no split 'test'.*--split NAME"):
        DataSource(name).check("test")
    with pytest.raises(ValueError, match=r"no split 'rare'; expected one of adversarial, popular, random"):
        DataSource(name, split="rare").check("test")


def test_files_made_by_seem_are_lists(tmp_path):
    file = official.pope(tmp_path) / "coco_pope_random.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.rename(tmp_path / "aokvqa_pope_seem_random.json").write_text(json.dumps(rows, indent=4))
    samples = DataSource(f"pope:{tmp_path}").load("test")
    assert [s.answer for s in samples] == ["yes", "no", "yes", "no"]
    assert samples[3].where == f"{tmp_path / 'aokvqa_pope_seem_random.json'} [3]"
    (tmp_path / "aokvqa_pope_seem_random.json").write_text(json.dumps(rows, indent=4)[:-40])
    with pytest.raises(ValueError, match=r"seem_random\.json line 2\d column \d+: not complete JSON"):
        DataSource(f"pope:{tmp_path}").check("test")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"label": "maybe"}, r"json line 2 \(question_id 2\): label is 'maybe'; expected yes or no"),
        ({"label": None}, r"json line 2 \(question_id 2\): label is None; expected yes or no"),
        ({"label": True}, r"json line 2 \(question_id 2\): label is True; expected yes or no"),
        ({"label": ["yes"]}, r"json line 2 \(question_id 2\): label is \['yes'\]; expected yes or no"),
        ({"text": " "}, r"json line 2: text is ' '; expected a text"),
        ({"image": 42}, r"json line 2: image is 42; expected a text"),
        ({"question_id": "2"}, r"json line 2: question_id is '2'; expected a whole number"),
        ({"question_id": 1}, r"json line 2\): .*json line 1 has the same id"),
        ({"image": "x.jpg"}, r"^1 of 3 pictures are missing, and 1 of 4 samples .*/x\.jpg \(.*json line 2\)"),
    ],
)  # fmt: skip
def test_bad_records_are_named(values, message, tmp_path):
    file = official.pope(tmp_path) / "coco_pope_random.json"
    rows = file.read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows[1]) | values)
    file.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=message):
        DataSource(f"pope:{tmp_path}").check("test")


def test_its_keys_are_fixed(tmp_path):
    with pytest.raises(ValueError, match="pope has fixed keys; leave out --map question="):
        DataSource(f"pope:{official.pope(tmp_path)}", {"question": "text"}).load("test")


def test_broken_files_are_named(tmp_path):
    file = official.pope(tmp_path) / "coco_pope_random.json"
    text = file.read_text()
    file.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"coco_pope_random\.json line 4 is not a complete JSON object"):
        DataSource(f"pope:{tmp_path}").check("test")
    file.write_text("7")
    with pytest.raises(ValueError, match=r"coco_pope_random\.json line 1: question_id is None"):
        DataSource(f"pope:{tmp_path}").check("test")
    file.write_text("")
    with pytest.raises(ValueError, match="holds no records"):
        DataSource(f"pope:{tmp_path}").check("test")
    file.unlink()
    with pytest.raises(ValueError, match=r"holds val2014; expected files such as coco_pope_random\.json"):
        DataSource(f"pope:{tmp_path}").check("test")
    official.pope(tmp_path)
    official.pope(tmp_path, under="coco")
    with pytest.raises(ValueError, match=r"are both the split random; keep one"):
        DataSource(f"pope:{tmp_path}").check("test")
