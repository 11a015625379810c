"""`lmms-eval:TASK` with the task files of lmms-eval itself, where it is installed.

The data sets of the hub are replaced by Parquet files of a few rows with the same columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import official_files as official
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sources import DataSource
from cmai_fast.tasks import TASKS, posed

datasets = pytest.importorskip("datasets")
lmms_eval = pytest.importorskip("lmms_eval", exc_type=ImportError)

FILES = Path(lmms_eval.__file__).parent / "tasks"
SHORT = "Answer the question using a single word or phrase."
DESCRIBE = "Provide a one-sentence caption for the provided image."
ASKED = ("What color?", "How many?")
COCO = {"license": 4, "coco_url": "http://x", "height": 6, "width": 8, "date_captured": "2013"}


def rows_of(task: str) -> list[dict[str, Any]]:
    """Rows with the columns of the hub's data set of the task."""
    pictures = [Image.new("RGB", (8, 6), (i, 0, 0)) for i in (42, 73)]
    if task == "vqav2_val":
        said = [official.TEN, ["2"] * 10]
        return [
            {
                "question_type": "what", "multiple_choice_answer": chosen, "image_id": i, "answer_type": "other",
                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(own, 1)],
                "question_id": 1000 * i, "question": question, "image": pictures[i],
            }
            for i, (chosen, own, question) in enumerate(zip(("maroon", "2"), said, ASKED, strict=True))
        ]  # fmt: skip
    if task == "flickr30k_test":
        return [
            {
                "image": pictures[i], "caption": [f"A man {i} .", f"Two dogs {i} ."], "sentids": ["1", "2"],
                "img_id": str(i), "filename": f"{i}.jpg",
            }
            for i in range(2)
        ]  # fmt: skip
    if task.startswith("pope"):
        return [
            {"id": str(i), "question_id": str(i), "question": "Is there a dog in the image?", "answer": answer,
             "image_source": "COCO_val2014_000000000042", "image": pictures[i], "category": "adversarial"}
            for i, answer in enumerate(("yes", "no"))
        ]  # fmt: skip
    return [
        {"question_id": f"COCO_val2014_{i:012d}.jpg", "image": pictures[i], "question": "Please describe.",
         "answer": [f"A bear {i}.", f"A bear sits {i}."], "id": 100 + i, "file_name": f"{i}.jpg", **COCO}
        for i in range(2)
    ]  # fmt: skip


SETS = {  # task: its file, the split that it reads, the prompt of its first document, its references, our task
    "vqav2_val": ("vqav2", "validation", f"What color?\n{SHORT}", tuple(official.TEN), "open-vqa"),
    "coco2014_cap_val": ("coco_cap", "val", DESCRIBE, ("A bear 0.", "A bear sits 0."), "captioning"),
    "coco2017_cap_val": ("coco_cap", "val", DESCRIBE, ("A bear 0.", "A bear sits 0."), "captioning"),
    "flickr30k_test": ("flickr30k", "test", DESCRIBE, ("A man 0 .", "Two dogs 0 ."), "captioning"),
    "pope_adv": ("pope", "adversarial", f"Is there a dog in the image?\n{SHORT}", ("yes",), "pope"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A function that makes `lmms-eval:TASK:FOLDER` of a task: its own file, and rows instead of the hub's data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))  # read when it is imported
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def made(task: str) -> str:
        folder, split, *_ = SETS[task]
        rows = tmp_path / "rows" / task
        rows.mkdir(parents=True)
        datasets.Dataset.from_list(rows_of(task)).to_parquet(rows / f"{split}.parquet")
        official.write(
            tmp_path / "tasks" / f"{task}.yaml",
            f"include: {FILES / folder / task}.yaml\ntask: {task}\ndataset_path: parquet\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    {split}: {rows / split}.parquet\n",
        )
        return f"lmms-eval:{task}:{tmp_path / 'tasks'}"

    return made


@pytest.mark.parametrize("task", SETS)
def test_documents_of_its_tasks_become_samples(task, place):
    _, _, prompt, references, ours = SETS[task]
    source = DataSource(place(task))
    source.check("test", answers=True, images=True)
    samples = source.load("test")
    assert len(samples) == 2 and [s.id for s in samples] == [0, 1]
    first = samples[0]
    assert (first.prompt, first.references, first.choices) == (prompt, references, ())
    assert posed(TASKS[ours], first).prompt == prompt
    assert first.where == f"{source.name} document 0"
    assert read_picture(first.images[0]).getpixel((0, 0)) == (42, 0, 0)
    assert source.fingerprint() == source.fingerprint() and source.fingerprint().isalnum()


def test_columns_of_documents_replace_what_the_task_makes(place):
    fields = {"answer": "multiple_choice_answer", "answers": "answers", "id": "question_id", "question": "question"}
    samples = DataSource(place("vqav2_val"), fields).load("test")
    assert [s.id for s in samples] == [0, 1000] and samples[0].prompt == "What color?"
    assert samples[0].references[0] == "maroon" and sorted(samples[0].references) == sorted(official.TEN)


def test_groups_and_unknown_tasks_are_named():
    with pytest.raises(ValueError, match=r"pope_adw is no task of lmms-eval .*; expected one task, such as pope_adv"):
        DataSource("lmms-eval:pope_adw").load("test")
    with pytest.raises(ValueError, match=r"vqav2 is a group of tasks of lmms-eval .*vqav2_val"):
        DataSource("lmms-eval:vqav2").load("test")
