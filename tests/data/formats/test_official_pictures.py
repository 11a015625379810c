"""Pictures of official data sets: odd ones are read, broken ones are named, missing ones are counted."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import official_files as official
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sources import DataSource

FIRST = "000000000285.jpg"


@pytest.fixture
def coco(tmp_path):
    return official.coco_captions(tmp_path)


def first(folder):
    return DataSource(f"coco-captions:{folder}").load("test")[0]


def test_cmyk_16_bit_and_rotated_pictures_are_read(coco):
    file = coco / "val2017" / FIRST
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(file, "JPEG")
    assert read_picture(first(coco).images[0]).mode == "RGB"
    assert read_picture(first(coco).images[0]).getpixel((0, 0))[0] > 200
    levels = np.full((6, 8), 32768, np.uint16)
    Image.fromarray(levels).save(file, "PNG")
    assert read_picture(first(coco).images[0]).getpixel((0, 0)) == (128, 128, 128)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 6)).save(file, "JPEG", exif=exif)
    assert read_picture(first(coco).images[0]).size == (6, 8)


def test_a_truncated_jpeg_is_named_when_it_is_read(coco):
    file = coco / "val2017" / FIRST
    Image.effect_noise((64, 64), 80).save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:-600])
    DataSource(f"coco-captions:{coco}").check("test")  # nothing is decoded
    sample = first(coco)
    with pytest.raises(ValueError, match=rf"sample 285 .*{FIRST}' cannot be decoded .*truncated or damaged"):
        read_picture(sample.images[0], sample.name)


def test_missing_pictures_are_counted_and_left_out_on_request(tmp_path):
    official.nlvr2(tmp_path)
    (tmp_path / "dev" / "dev-850-1-img0.png").unlink()
    name = f"nlvr2:{tmp_path}"
    with pytest.raises(ValueError, match=r"^1 of 4 pictures are missing, and 2 of 3 samples need them: .*--missing N"):
        DataSource(name).check()
    with pytest.warns(UserWarning, match=r"^1 of 4 pictures are missing, and 2 of 3 samples are left out: .*img0\.png"):
        left = DataSource(name, missing=1).load("test")
    assert [s.id for s in left] == ["dev-850-0-0"]
    for file in (tmp_path / "dev").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"^4 of 4 pictures are missing, and 3 of 3 samples need them: "):
        DataSource(name, missing=3).load("test")
    with pytest.raises(ValueError, match=r"^4 of 4 pictures are missing, .* so no sample is left: .*dev-850-0-img0"):
        DataSource(name, missing=9).load("test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        official.nlvr2(tmp_path)
        assert len(DataSource(name, missing=9).load("test")) == 3


def test_pictures_stay_where_they_are_and_pytorch_is_not_loaded(tmp_path):
    """Checks of all formats, in a process of their own."""
    made = {name.replace("_", "-"): getattr(official, name)(tmp_path / name) for name in
            ("vqav2", "coco_captions", "flickr30k", "nlvr2", "nlvr", "pope")}  # fmt: skip
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    names = [f"{name}:{folder}" for name, folder in made.items()]
    code = (
        "import sys\nfrom cmai_fast.data.sources import DataSource\n"
        f"for name in {names!r}:\n    s = DataSource(name)\n    s.check('test', answers=True, images=True)\n"
        "    assert s.load('test') and s.fingerprint()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before


def test_no_format_imports_pytorch_in_its_file():
    import cmai_fast.data.formats as formats

    files = list(Path(formats.__file__).parent.glob("*.py"))
    assert len(files) > 10 and not [f.name for f in files if "import torch" in f.read_text()]
