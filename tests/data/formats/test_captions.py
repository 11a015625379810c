"""COCO captions and Flickr30k in their official files and in Karpathy's."""

from __future__ import annotations

import pytest

import official_files as official
from cmai_fast.data.sources import DataSource

VAL = "annotations/captions_val2017.json"


@pytest.mark.parametrize("split", ["val2014", "train2014", "val2017", "train2017"])
@pytest.mark.parametrize("under, pictures", [("annotations", "{}"), ("", "images/{}"), ("Annotations", "images")])
def test_coco_has_one_sample_per_image_with_its_captions_by_id(split, under, pictures, tmp_path):
    source = DataSource(f"coco-captions:{official.coco_captions(tmp_path, split, under, pictures)}")
    source.check("test", answers=True, images=True)
    samples = source.load("test")
    assert [(s.id, s.prompt) for s in samples] == [(285, ""), (139, "")]
    assert [s.references for s in samples] == [("A brown bear.", "A bear sits."), ("A room.", "A table ")]
    name = "000000000285.jpg" if split.endswith("2017") else f"COCO_{split}_000000000285.jpg"
    assert samples[0].images == (str(tmp_path / pictures.format(split) / name),)
    assert samples[0].where == f"{tmp_path}/{under}{'/' * bool(under)}captions_{split}.json images[0]"


def test_two_years_in_one_folder_need_a_choice(tmp_path):
    for split in ("train2014", "val2014", "val2017"):
        official.coco_captions(tmp_path, split)
    source = DataSource(f"coco-captions:{tmp_path}")
    assert len(source.load("train")) == 2
    with pytest.raises(ValueError, match=r"val2014 and val2017 may both be the split calibration; choose by --split"):
        source.load("calibration")
    assert "val2017" in DataSource(f"coco-captions:{tmp_path}", split="val2017").load("test")[0].images[0]
    with pytest.raises(ValueError, match=r"has no split 'val2018'; expected one of train2014, val2014, val2017"):
        DataSource(f"coco-captions:{tmp_path}", split="val2018").check()


def cut(path):
    path.write_text(path.read_text()[:-30])


def having(key, i, **values):
    return lambda path: official.changed(path, lambda v: v[key][i].update(values))


@pytest.mark.parametrize(
    "change, message",
    [
        (cut, r"captions_val2017\.json line 1 column \d+: not complete JSON .*get the file again"),
        (having("annotations", 2, caption=""), r"annotations\[2\]: caption is ''; expected a text that is not empty"),
        (having("annotations", 2, image_id=9), r"annotations\[2\]: image_id 9 is not among the images of the file"),
        (having("annotations", 2, id=30), r"annotations\[2\]: id 30 is also that of annotations\[0\]"),
        (having("images", 1, id=285), r"annotations\[1\]: image_id 139 is not among"),
        (lambda p: official.changed(p, lambda v: v["images"].append(dict(v["images"][0]))), r"has the same id"),
        (
            lambda p: official.changed(p, lambda v: v["images"].append({"id": 3})),
            r"images\[2\]: image 3 has no caption",
        ),
        (having("images", 0, file_name=None), r"images\[0\]: file_name is None"),
        (lambda p: p.write_text("{}"), r"has no list 'images'; expected the official file"),
    ],
)
def test_bad_coco_files_are_named(change, message, tmp_path):
    official.coco_captions(tmp_path)
    change(tmp_path / VAL)
    with pytest.raises(ValueError, match=message):
        DataSource(f"coco-captions:{tmp_path}").check()


def karpathy_coco(folder):
    splits = ("train", "restval", "val", "test", "test")
    records = []
    for i, split in enumerate(splits):
        place, name = "val2014" if i else "train2014", f"COCO_{i}.jpg"
        official.picture(folder / place / name, (i, 0, 0))
        records.append({"filepath": place, "filename": name, "split": split, "cocoid": 100 + i})
    return official.karpathy(folder / "dataset_coco.json", records, "coco")


def test_the_splits_of_karpathy_for_coco(tmp_path):
    karpathy_coco(tmp_path)
    source = DataSource(f"coco-captions:{tmp_path}")
    source.check(answers=True, images=True)
    by = {split: source.load(split) for split in ("train", "calibration", "test")}
    assert {k: [s.id for s in v] for k, v in by.items()} == {
        "train": [100, 101],
        "calibration": [102],
        "test": [103, 104],
    }
    assert by["train"][0].images == (str(tmp_path / "train2014" / "COCO_0.jpg"),)
    assert by["train"][0].references == ("A picture 0 0.", "A picture 0 1.")
    official.coco_captions(tmp_path)  # beside it: its splits have other names
    assert [s.id for s in source.load("test")] == [103, 104]
    assert len(DataSource(f"coco-captions:{tmp_path}", split="val2017").load("test")) == 2


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"split": "dev"},
            r"dataset_coco\.json images\[3\]: split is 'dev'; expected one of train, restval, val, test",
        ),
        ({"cocoid": None}, r"images\[3\]: cocoid is None"),
        ({"filename": ""}, r"images\[3\]: filename is ''"),
        ({"sentences": []}, r"images\[3\] has no sentences"),
        ({"sentences": [{"raw": " ", "sentid": 1}]}, r"images\[3\] sentences\[0\]: raw is ' '"),
        ({"sentences": None}, r"images\[3\] has no list 'sentences'"),
    ],
)
def test_bad_records_of_karpathy_are_named(values, message, tmp_path):
    having("images", 3, **values)(karpathy_coco(tmp_path))
    with pytest.raises(ValueError, match=message):
        DataSource(f"coco-captions:{tmp_path}").check("test")


@pytest.mark.parametrize(
    "name, pictures",
    [
        ("results_20130124.token", "flickr30k-images"),
        ("results.csv", "flickr30k_images"),
        ("flickr30k_images/results.csv", "flickr30k_images/flickr30k_images"),
    ],
)
def test_flickr30k_has_one_sample_per_image_with_its_captions_by_number(name, pictures, tmp_path):
    source = DataSource(f"flickr30k:{official.flickr30k(tmp_path, name, pictures)}")
    source.check("test", answers=True, images=True)
    samples = source.load("test")
    assert [(s.id, s.prompt) for s in samples] == [("1000092795", ""), ("10002456", "")]
    assert samples[0].references == ("Two # young guys | hair .", "Two men .")
    assert samples[0].images == (str(tmp_path / pictures / "1000092795.jpg"),)
    assert samples[0].where == f"{tmp_path / name} line {1 if name.endswith('token') else 2}"
    before = source.fingerprint()
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    assert source.fingerprint() != before


def test_the_known_line_of_the_table_that_lacks_a_bar(tmp_path):
    official.flickr30k(tmp_path, "results.csv")
    file = tmp_path / "results.csv"
    file.write_text(file.read_text().replace("10002456.jpg| 1| A crane .", "10002456.jpg| 1   A crane ."))
    assert DataSource(f"flickr30k:{tmp_path}").load("test")[1].references == ("Several men .", "A crane .")


def test_the_splits_of_karpathy_for_flickr30k(tmp_path):
    official.flickr30k(tmp_path)  # the file with splits takes precedence
    records = [
        {"filename": f"{name}.jpg", "split": split}
        for name, split in (("1000092795", "train"), ("10002456", "val"), ("36979", "test"))
    ]
    official.picture(tmp_path / "flickr30k-images" / "36979.jpg")
    official.karpathy(tmp_path / "dataset_flickr30k.json", records, "flickr30k")
    source = DataSource(f"flickr30k:{tmp_path}")
    source.check(answers=True, images=True)
    assert [[s.id for s in source.load(k)] for k in ("train", "calibration", "test")] == [
        ["1000092795"], ["10002456"], ["36979"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, row, message",
    [
        (
            "results_20130124.token",
            "10002456.jpg#2",
            r"token line 5 is '10002456\.jpg#2'; expected 1000092795\.jpg#0, a tab",
        ),
        ("results_20130124.token", "10002456.jpg#2\t ", r"token line 5: caption is ''; expected a text"),
        ("results_20130124.token", "10002456.jpg#1\tTwice .", r"token line 5: 10002456\.jpg has a second caption 1"),
        ("results.csv", "10002456.jpg", r"results\.csv line 6 is '10002456\.jpg'; expected 1000092795\.jpg\| 0\|"),
        ("results.csv", "10002456.jpg| 2| ", r"results\.csv line 6: caption is ''"),
    ],
)
def test_bad_lines_of_flickr30k_are_named(name, row, message, tmp_path):
    file = official.flickr30k(tmp_path, name) / name
    file.write_text(file.read_text() + row)
    with pytest.raises(ValueError, match=message):
        DataSource(f"flickr30k:{tmp_path}").check()


def test_a_folder_without_captions_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"has no dataset_flickr30k\.json, results_20130124\.token or results\.csv"):
        DataSource(f"flickr30k:{tmp_path}").check()
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds captions\.json; expected files such as captions_val2017\.json or"):
        DataSource(f"coco-captions:{tmp_path}").check()
