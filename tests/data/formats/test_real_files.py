"""Official files as their owners publish them, where they are at hand.

They are not part of the repository. CMAI_FAST_REAL_DATA names a folder that holds `coco_val2017/` (the file
captions_val2017.json, and pictures in val2017/), `nlvr2/` (dev_500.json), `nlvr_v1/` (dev.json,
dev_images_perm0.zip) and `pope/` (the three files coco_pope_*.json); without it, `../shared/data` is used.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cmai_fast.data.formats import FORMATS
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sources import DataSource

REAL = Path(os.environ.get("CMAI_FAST_REAL_DATA") or Path(__file__).parents[4] / "shared" / "data")


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"needs the official file {name} in the folder that CMAI_FAST_REAL_DATA names")
    return REAL / name


def test_coco_val2017():
    folder = real("coco_val2017/captions_val2017.json").parent
    source = DataSource(f"coco-captions:{folder}", split="val2017")
    source.check("test", answers=True, images=True)
    samples = source.load("test")
    assert (len(samples), sum(len(s.references) for s in samples)) == (85, 425)
    assert (
        samples[0].id == 285 and samples[0].answer == "A big burly grizzly bear is show with grass in the background."
    )
    for sample in samples:
        assert read_picture(sample.images[0], sample.name).mode == "RGB"
    parts = [DataSource(f"coco-captions:{folder}", split_seed=0).load(k) for k in ("train", "calibration", "test")]
    assert [len(part) for part in parts] == [69, 8, 8]


def test_nlvr2_dev(tmp_path):
    shutil.copy(real("nlvr2/dev_500.json"), tmp_path / "dev.json")
    samples = list(FORMATS["nlvr2"].read(str(tmp_path), "dev", {}))
    assert len(samples) == len({s.id for s in samples}) == 500
    assert sum(s.references == ("true",) for s in samples) == 260
    assert {s.references for s in samples} == {("true",), ("false",)}
    with pytest.raises(ValueError, match=r"^578 of 578 pictures are missing, and 500 of 500 samples need them: "):
        DataSource(f"nlvr2:{tmp_path}").check()


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope(split, tmp_path):
    shutil.copy(real(f"pope/coco_pope_{split}.json"), tmp_path)
    samples = list(FORMATS["pope"].read(str(tmp_path), split, {}))
    assert [s.id for s in samples] == list(range(1, 3001))
    assert sum(s.references == ("yes",) for s in samples) == sum(s.references == ("no",) for s in samples) == 1500
    assert samples[0].prompt == "Is there a snowboard in the image?"
    with pytest.raises(ValueError, match=r"^500 of 500 pictures are missing, and 3000 of 3000 samples need them: "):
        DataSource(f"pope:{tmp_path}").check()


def test_nlvr_dev_and_the_zip_of_its_pictures(tmp_path):
    shutil.copy(real("nlvr_v1/dev.json"), tmp_path)
    archive = Path(shutil.copy(real("nlvr_v1/dev_images_perm0.zip"), tmp_path))
    source = DataSource(f"nlvr:{tmp_path}")
    source.check(answers=True, images=True)
    zipped = source.load("test")
    assert len(zipped) == 989 and {s.references for s in zipped} == {("true",), ("false",)}
    pixels = [read_picture(s.images[0], s.name) for s in zipped[::40]]
    assert {p.size for p in pixels} == {(400, 100)}
    shutil.unpack_archive(archive, tmp_path / "images")
    archive.unlink()
    source.check(answers=True, images=True)
    assert [read_picture(s.images[0]).tobytes() for s in source.load("test")[::40]] == [p.tobytes() for p in pixels]
