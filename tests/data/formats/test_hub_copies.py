"""The commands of docs/formats.md for copies on the hub, on local Parquet data sets with the same columns, where
`datasets` is installed. Nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import official_files as official
from cmai_fast.cli.options import pairs
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sources import DataSource
from cmai_fast.tasks import TASKS

datasets = pytest.importorskip("datasets")

DOC = (Path(__file__).parents[3] / "docs" / "formats.md").read_text("utf-8")
ROWS = re.findall(r"^\| [^|]+ \| `hf:([\w/.-]+)(?::\w+)?` \| ([^|]*) \|", DOC, re.MULTILINE)

LEFT, RIGHT = (Image.new("RGB", (8, 6), (level, 0, 0)) for level in (42, 73))
COCO_URL = "http://images.cocodataset.org/val2017/000000000139.jpg"
NLVR2 = {"question_id": "dev-850-0-0", "left_image": LEFT, "right_image": RIGHT, "writer": "61", "synset": "dog",
         "left_url": "https://a.org/b.jpg", "right_url": "https://a.org/c.jpg"}  # fmt: skip
COPIES: dict[str, tuple[str, dict[str, Any]]] = {  # split, a row
    "lmms-lab/VQAv2": ("validation", {
        "question_type": "what", "multiple_choice_answer": "maroon", "image_id": 42, "answer_type": "other",
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(official.TEN, 1)],
        "question_id": 42000, "question": "What color?", "image": LEFT,
    }),
    "lmms-lab/COCO-Caption2017": ("val", {
        "question_id": "000000000139.jpg", "image": LEFT, "question": "Please caption.",
        "answer": ["A room.", "A bed."],
        "id": 139, "license": 4, "file_name": "000000000139.jpg", "coco_url": COCO_URL, "height": 6, "width": 8,
        "date_captured": "2013",
    }),
    "lmms-lab/flickr30k": ("test", {
        "image": LEFT, "caption": ["Two men .", "A yard ."], "sentids": ["0", "1"], "img_id": "0",
        "filename": "1000092795.jpg",
    }),
    "lmms-lab/NLVR2": ("unbalanced_dev", {**NLVR2, "question": "There are dogs.", "answer": "True"}),
    "HuggingFaceM4/NLVR2": ("validation", {
        "sentence": "There are dogs.", "left_image": LEFT, "right_image": RIGHT, "label": "True",
        "identifier": "dev-850-0-0",
    }),
    "TIGER-Lab/NLVR2": ("test", {
        "id": "n0", "images": [LEFT, RIGHT], "question": "There are dogs.", "options": ["True", "False"],
        "answer": "True",
    }),
}  # fmt: skip
MADE = {  # id, prompt, references in any order, number of pictures, task
    "lmms-lab/VQAv2": (42000, "What color?", official.TEN, 1, "open-vqa"),
    "lmms-lab/COCO-Caption2017": (139, "Please caption.", ["A room.", "A bed."], 1, "captioning"),
    "lmms-lab/flickr30k": ("1000092795.jpg", "", ["Two men .", "A yard ."], 1, "retrieval"),
    "lmms-lab/NLVR2": ("dev-850-0-0", "There are dogs.", ["True"], 2, "reasoning"),
    "HuggingFaceM4/NLVR2": ("dev-850-0-0", "There are dogs.", ["True"], 2, "reasoning"),
    "TIGER-Lab/NLVR2": ("n0", "There are dogs.", ["True"], 2, "reasoning"),
}


def test_every_copy_of_the_docs_is_here():
    assert {repo for repo, _ in ROWS} == set(COPIES) == set(MADE)


@pytest.mark.parametrize(("repo", "options"), ROWS)
def test_the_options_make_the_samples(repo, options, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))  # read when it is imported
    split, row = COPIES[repo]
    official.write(
        tmp_path / "copy" / "README.md",
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: data/{split}-*\n---\n",
    )
    (tmp_path / "copy" / "data").mkdir()
    file = tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet"
    datasets.Dataset.from_list([row]).to_parquet(file)
    fields = ",".join(re.findall(r"--map ([^\s`]+)", options)).split(",")
    named = re.search(r"--split (\w+)", options)
    source = DataSource(f"hf:{tmp_path / 'copy'}", pairs(fields, "--map"), split=named and named[1])
    source.check("test", answers=True, images=True)
    (sample,) = source.load("test")
    own, prompt, references, pictures, task = MADE[repo]
    assert (sample.id, sample.prompt, sorted(sample.references)) == (own, prompt, sorted(references))
    levels = [read_picture(image).getpixel((0, 0))[0] for image in sample.images]
    assert levels == [42, 73][:pictures]
    if task != "retrieval":
        assert TASKS[task].wrong_answers(sample, [sample]) is not None
