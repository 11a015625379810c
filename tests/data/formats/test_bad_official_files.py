"""What may be wrong with a copy of official files, in every format: named with file and place, before PyTorch is
loaded. The tests of each format have what is particular to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import official_files as official
from cmai_fast.data.sources import DataSource


def coco_of_karpathy(folder: Path) -> Path:
    records = [{"filepath": "val2014", "filename": f"{i}.jpg", "split": "test", "cocoid": i} for i in (7, 8)]
    for record in records:
        official.picture(folder / "val2014" / str(record["filename"]))
    official.karpathy(folder / "dataset_coco.json", records, "coco")
    return folder


def flickr30k_of_karpathy(folder: Path) -> Path:
    records = [{"filename": f"{i}.jpg", "split": "test"} for i in (7, 8)]
    for record in records:
        official.picture(folder / "flickr30k-images" / record["filename"])
    official.karpathy(folder / "dataset_flickr30k.json", records, "flickr30k")
    return folder


MADE = {  # the format, its folder, the file of records, where a record lies that needs the first picture
    "vqav2": ("vqav2", official.vqav2, "v2_OpenEnded_mscoco_val2014_questions.json", "questions[0]"),
    "coco": ("coco-captions", official.coco_captions, "annotations/captions_val2017.json", "images[1]"),
    "coco, Karpathy": ("coco-captions", coco_of_karpathy, "dataset_coco.json", "images[0]"),
    "flickr30k": ("flickr30k", official.flickr30k, "results_20130124.token", "line 1"),
    "flickr30k, Karpathy": ("flickr30k", flickr30k_of_karpathy, "dataset_flickr30k.json", "images[0]"),
    "nlvr2": ("nlvr2", official.nlvr2, "dev.json", "line 1"),
    "nlvr": ("nlvr", official.nlvr, "dev.json", "line 2"),
    "pope": ("pope", official.pope, "coco_pope_random.json", "line 1"),
}
every = pytest.mark.parametrize("made", MADE.values(), ids=MADE)


def refused(name: str, folder: Path, **values: str) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        DataSource(f"{name}:{folder}", **values).check("test", answers=True, images=True)
    assert "\n" not in str(error.value)
    return str(error.value)


@every
def test_a_file_that_ends_half_way(made, tmp_path):
    name, make, file, _ = made
    path = make(tmp_path) / file
    text = path.read_text().rstrip()
    path.write_text(text[:-12] if path.suffix == ".json" else text.rpartition("#")[0])
    assert re.match(rf"{re.escape(str(path))} line \d+ ", refused(name, tmp_path))


@every
def test_a_picture_that_is_missing(made, tmp_path):
    name, make, file, where = made
    path = make(tmp_path) / file
    gone = sorted(p for p in tmp_path.rglob("*") if p.suffix in (".jpg", ".png"))[0]
    gone.unlink()
    said = refused(name, tmp_path)
    assert re.match(r"1 of \d pictures are missing, and \d of \d samples need them: ", said)
    assert f"{gone} ({path} {where})" in said and "--missing N" in said


@every
def test_two_records_with_one_id(made, tmp_path):
    name, make, file, _ = made
    path = make(tmp_path) / file
    if path.suffix != ".json" or name in ("nlvr2", "nlvr", "pope"):
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows, rows[0]]))
        place = f"line {len(rows) + 1}"
    else:
        key = "questions" if name == "vqav2" else "images"
        official.changed(path, lambda v: v[key].append(v[key][0]))
        place = f"{key}[{len(json.loads(path.read_text())[key]) - 1}]"
    assert f"{path} {place}" in refused(name, tmp_path)


@every
def test_a_split_that_there_is_not(made, tmp_path):
    name, make, _, _ = made
    said = refused(name, make(tmp_path), split="val2018")
    assert "split 'val2018'; " in said and ("expected one of" in said or "leave out --split" in said)


def test_commands_name_them_before_pytorch_is_loaded(tmp_path):
    """One process for all commands; it never loads PyTorch."""
    for name, make, *_ in MADE.values():
        make(tmp_path / name)
    cut = tmp_path / "pope" / "coco_pope_random.json"
    cut.write_text(cut.read_text()[:-20])
    (tmp_path / "nlvr" / "images" / "0" / "dev-1373-1-0.png").unlink()
    annotations = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    official.changed(annotations, lambda v: v["annotations"][0].update(question_id=5))
    captions = tmp_path / "coco-captions" / "annotations" / "captions_val2017.json"
    official.changed(captions, lambda v: v["annotations"][1].update(caption=" "))
    rows = (tmp_path / "nlvr2" / "dev.json").read_text()
    (tmp_path / "nlvr2" / "dev.json").write_text(rows + rows.splitlines()[0])
    wanted = {
        "pope:pope --task pope": "coco_pope_random.json line 4 is not a complete JSON object",
        "nlvr:nlvr --task reasoning": "dev.json line 2)",
        "vqav2:vqav2 --task open-vqa": "annotations.json annotations[0]: question_id 5 is not in",
        "coco-captions:coco-captions --split val2017 --task captioning": "annotations[1]: caption is ' '",
        "nlvr2:nlvr2 --task reasoning": "dev.json line 4): ",
        "flickr30k:flickr30k --split train2 --task captioning": "has no split 'train2'; expected one of train, val",
    }
    program = """
import json, sys
from typer.testing import CliRunner
from cmai_fast.cli import app
for line in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, ["evaluate", "--model", "easyvqa-llava", "--out", "x", "--data", *line.split()])
    print(json.dumps([done.exit_code, done.stderr, "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([*wanted])], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    for (line, message), answer in zip(wanted.items(), map(json.loads, done.stdout.splitlines()), strict=True):
        code, said, heavy = answer
        assert (code, heavy) == (2, False) and message in said and said.count("\n") == 1, (line, answer)
