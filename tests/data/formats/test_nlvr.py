"""NLVR2 (two photos) and NLVR (drawn pictures) in their official files."""

from __future__ import annotations

import json
import pickle
import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image

import official_files as official
from cmai_fast.data import Sample, VQACollator
from cmai_fast.data.choices import ChoiceCollator
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sources import DataSource
from cmai_fast.data.zipped import ZippedPicture
from processors import GENERATIVE, processor_of


@pytest.mark.parametrize("under, pictures", [("", "{}"), ("data", "images/{}"), ("", "images")])
def test_nlvr2_has_two_photos_and_a_truth(under, pictures, tmp_path):
    source = DataSource(f"nlvr2:{official.nlvr2(tmp_path, pictures=pictures, under=under)}")
    source.check(answers=True, images=True)
    samples = source.load("test")
    place = tmp_path / pictures.format("dev")
    assert samples[1] == Sample(
        "dev-850-1-0",
        (str(place / "dev-850-1-img0.png"), str(place / "dev-850-1-img1.png")),
        "There are 1 dogs.",
        ("false",),
        ("true", "false"),
    )
    assert samples[2].images == samples[1].images and samples[2].references == ("true",)
    assert samples[2].where == f"{tmp_path / under / 'dev.json'} line 3"


def test_nlvr2_has_the_splits_train_dev_and_test1(tmp_path):
    for split in ("train", "dev", "test1", "test2"):
        official.nlvr2(tmp_path, split)
    source = DataSource(f"nlvr2:{tmp_path}")
    source.check()
    assert source.load("train")[0].images[0] == str(tmp_path / "train" / "38" / "train-850-0-img0.png")
    assert [source.load(k)[0].id for k in ("calibration", "test")] == ["dev-850-0-0", "test1-850-0-0"]
    assert DataSource(f"nlvr2:{tmp_path}", split="test2").load("test")[0].id == "test2-850-0-0"


def test_a_hidden_test_set_has_no_labels(tmp_path):
    file = official.nlvr2(tmp_path) / "dev.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "label"}) for row in rows))
    sample = DataSource(f"nlvr2:{tmp_path}").load("test")[0]
    assert sample.references == () and sample.choices == ("true", "false")


@pytest.mark.parametrize("data", ["nlvr2", "nlvr"])
@pytest.mark.parametrize(
    "values, message",
    [
        ({"label": "Maybe"}, r"dev\.json line 2 \(identifier '.*'\): label is 'Maybe'; expected True or False"),
        ({"label": 1}, r"line 2 .*: label is 1; expected True or False"),
        ({"sentence": ""}, r"line 2: sentence is ''"),
        ({"identifier": 5}, r"line 2: identifier is 5"),
    ],
)
def test_bad_records_are_named(data, values, message, tmp_path):
    file = getattr(official, data)(tmp_path) / "dev.json"
    rows = file.read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows[1]) | values)
    file.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=message):
        DataSource(f"{data}:{tmp_path}").check()


@pytest.mark.parametrize("data", ["nlvr2", "nlvr"])
def test_broken_lines_and_doubles_are_named(data, tmp_path):
    file = getattr(official, data)(tmp_path) / "dev.json"
    text = file.read_text()
    last = text.count("\n")
    file.write_text(text[:-20])
    with pytest.raises(ValueError, match=rf"dev\.json line {last} is not a complete JSON object .*; complete the line"):
        DataSource(f"{data}:{tmp_path}").check()
    file.write_text(text + text.splitlines()[0])
    with pytest.raises(ValueError, match=rf"dev\.json line {last + 1}\): .*dev\.json line 1 has the same id"):
        DataSource(f"{data}:{tmp_path}").check()
    file.write_text(text.replace('"identifier": "', '"identifier": "x'))
    message = (
        r"line 1: identifier is 'xdev-850-0-0'; expected SPLIT-SET" if data == "nlvr2" else r"^2 of 2 pictures are"
    )
    with pytest.raises(ValueError, match=message):
        DataSource(f"{data}:{tmp_path}").check()
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"line 1: identifier is None"):
        DataSource(f"{data}:{tmp_path}").check()


@pytest.mark.parametrize("pictures", ["images/{}", "images", ""])
@pytest.mark.parametrize("under", ["", "dev"])
def test_nlvr_has_one_picture_and_a_truth(pictures, under, tmp_path):
    folder = official.nlvr(tmp_path / under, pictures=pictures)
    source = DataSource(f"nlvr:{tmp_path}")
    source.check(answers=True, images=True)
    samples = source.load("test")
    place = folder / pictures.format("2")
    assert samples[0] == Sample(
        "1572-0", (str(place / "dev-1572-0-0.png"),), "There is a box, 1572-0.", ("true",), ("true", "false")
    )
    assert samples[1].references == ("false",)


def test_pictures_of_nlvr_are_read_from_a_zip(tmp_path):
    official.nlvr(tmp_path, pictures="")
    plain = DataSource(f"nlvr:{tmp_path}")
    before = plain.load("test")
    sent = [read_picture(s.images[0]).tobytes() for s in before]
    files = sorted(tmp_path.glob("*.png"))
    with zipfile.ZipFile(tmp_path / "dev_images_perm0.zip", "w") as archive:
        for file in files:
            archive.write(file, f"deep/{file.name}")
            file.unlink()
    plain.check(answers=True, images=True)
    samples = pickle.loads(pickle.dumps(plain.load("test")))
    assert [read_picture(s.images[0]).tobytes() for s in samples] == sent
    assert not any(tmp_path.glob("*.png"))
    with zipfile.ZipFile(tmp_path / "dev_images_perm0.zip", "w") as archive:
        archive.writestr("dev-1572-0-0.png", b"no picture")
    with pytest.raises(ValueError, match=r"^1 of 1 pictures are missing.*images/0/dev-1373-1-0\.png"):
        plain.check()
    with pytest.raises(ValueError, match=r"dev_images_perm0\.zip/deep/dev-1572-0-0\.png cannot be read \(.*no item"):
        read_picture(samples[0].images[0])
    with pytest.raises(ValueError, match=r"its image '.*dev_images_perm0\.zip/dev-1572-0-0\.png' cannot be read as an"):
        read_picture(ZippedPicture(str(tmp_path / "dev_images_perm0.zip"), "dev-1572-0-0.png"), "its image")
    (tmp_path / "dev_images_perm0.zip").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match=r"dev_images_perm0\.zip cannot be read"):
        plain.check()


def test_a_split_seed_keeps_the_statements_about_a_pair_together(tmp_path):
    rows = []
    for n in range(30):
        for sentence in (0, 1):
            rows.append({"sentence": "One dog.", "label": "True", "identifier": f"dev-{n}-0-{sentence}"})
        for side in (0, 1):
            official.picture(tmp_path / "dev" / f"dev-{n}-0-img{side}.png", (n, side, 0))
    official.write(tmp_path / "dev.json", "\n".join(map(json.dumps, rows)))
    source = DataSource(f"nlvr2:{tmp_path}", split_seed=0)
    parts = [source.load(split) for split in ("train", "calibration", "test")]
    assert [len(part) for part in parts] == [48, 6, 6]
    pairs = [{s.images for s in part} for part in parts]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == 30


def test_photos_that_are_no_png_are_read_by_their_content(tmp_path):
    official.nlvr2(tmp_path)
    Image.new("RGB", (3, 2), "blue").save(tmp_path / "dev" / "dev-850-0-img0.png", "JPEG")
    picture = DataSource(f"nlvr2:{tmp_path}").load("test")[0].images[0]
    assert read_picture(picture).size == (3, 2)


def test_two_photos_for_a_family_of_one_are_named_with_file_and_line(tmp_path):
    samples = DataSource(f"nlvr2:{official.nlvr2(tmp_path)}").load("test")
    family = next(f for f in GENERATIVE if f.single)
    message = r"^sample 'dev-850-0-0' \(.*dev\.json line 1\)"
    with pytest.raises(ValueError, match=rf"{message}: .*Processor takes one image per prompt, not 2"):
        VQACollator(processor_of(family)).prompts(samples)
    clip = SimpleNamespace(tokenizer=lambda texts, **_: {"input_ids": texts}, image_processor=None)
    with pytest.raises(ValueError, match=rf"{message} has 2 images; a dual encoder takes exactly one"):
        ChoiceCollator(clip, ["true", "false"])(samples)
