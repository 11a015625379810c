"""docs/formats.md has a section for each format of official files; its commands, and those of docs/tasks.md, run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import official_files as official
from cmai_fast.data.formats import FORMATS
from cmai_fast.tasks import TASKS

DOC, TASKS_DOC, LMMS_DOC = (
    (Path(__file__).parents[2] / "docs" / name).read_text("utf-8")
    for name in ("formats.md", "tasks.md", "lmms-eval.md")
)
COMMANDS = [line for line in (DOC + TASKS_DOC).splitlines() if line.startswith("cmai-fast ")]
OFFICIAL = ("coco-captions", "flickr30k", "nlvr", "nlvr2", "pope", "vqav2")


def test_each_format_of_official_files_has_a_section_and_a_command():
    assert {name for name, form in FORMATS.items() if form.takes == "FOLDER"} == {*OFFICIAL, "folder", "imagefolder"}
    for name in OFFICIAL:
        assert f"\n## {name}\n" in DOC and any(f"--data {name}:" in line for line in COMMANDS)


def test_each_task_has_a_row():
    assert all(f"\n| `{name}` |" in TASKS_DOC for name in TASKS)


def lmms_eval_commands():
    return [line for line in LMMS_DOC.splitlines() if line.startswith("cmai-fast ")]


@pytest.mark.parametrize("line", lmms_eval_commands())
def test_commands_of_lmms_eval_run(line, run, replace_workflow, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace())
    command, *typed = shlex.split(re.sub(r"--model \S+", "--model easyvqa-llava", line))[1:]
    called = replace_workflow(command, KeyboardInterrupt())
    done = run(command, *typed)
    assert len(called.calls) == 1, done.output


def third(folder: Path) -> None:
    """A third picture for train2014 of VQAv2, so that it can be divided."""
    official.picture(folder / "train2014" / "COCO_train2014_000000000099.jpg", "blue")
    more = {"image_id": 99, "question_id": 99000}
    for name, key in (("OpenEnded_mscoco_train2014", "questions"), ("mscoco_train2014", "annotations")):
        official.changed(folder / f"v2_{name}_{key}.json", lambda v, key=key: v[key].append(v[key][0] | more))


@pytest.fixture
def folders(tmp_path):
    for split in ("train2014", "val2014"):
        official.vqav2(tmp_path / "vqa", split)
    official.vqav2(tmp_path / "vqa", "test-dev2015", answers=False)
    third(tmp_path / "vqa")
    official.coco_captions(tmp_path / "coco", "train2017")
    official.coco_captions(tmp_path / "coco")
    tokens = official.flickr30k(tmp_path / "flickr30k") / "results_20130124.token"
    tokens.write_text(tokens.read_text() + "36979.jpg#0\tA third .\n")
    official.picture(tmp_path / "flickr30k" / "flickr30k-images" / "36979.jpg", "blue")
    for split in ("train", "dev", "test1"):
        official.nlvr2(tmp_path / "nlvr2", split, "images/{}" if split == "train" else "{}")
    for split in ("train", "dev"):
        official.nlvr(tmp_path / "nlvr" / split, split)
    for split in ("random", "popular", "adversarial"):
        official.pope(tmp_path / "pope", split)
    official.picture(tmp_path / "cat.png", "blue")
    (tmp_path / "pets.jsonl").write_text(
        '{"image": "cat.png", "question": "what is it?", "answer": "cat", "choices": ["cat", "dog"]}\n'
    )
    scenes = [
        official.picture(tmp_path / "runs" / "scenes" / f"{color}.png", color) for color in ("red", "blue", "green")
    ]
    lines = [json.dumps({"file_name": file.name, "caption": f"a {file.stem} shape"}) for file in scenes]
    (scenes[0].parent / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_run(line, run, replace_workflow):
    command, *typed = shlex.split(re.sub(r"--(model|against) \S+", r"--\1 easyvqa-llava", line))[1:]
    called = replace_workflow(command, KeyboardInterrupt())
    done = run(command, *typed)
    assert len(called.calls) == 1, done.output
