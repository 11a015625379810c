"""`lmms-eval:TASK` against a stand-in for lmms-eval, and its absence. test_lmms_eval_real.py has the package itself."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

import cmai_fast.data.formats.lmms_eval as adapter
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource

RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")


class Task:
    """A task as lmms-eval makes it of a file, as far as it is used."""

    def __init__(self, docs, target="answer", choices=None, visual=lambda doc: [doc["image"]]):
        self.eval_docs, self.config = docs, SimpleNamespace(doc_to_target=target, doc_to_choice=choices)
        self.doc_to_visual = visual

    def doc_to_text(self, doc):
        return doc["question"] + " Briefly."

    def doc_to_target(self, doc):
        target = self.config.doc_to_target
        return target(doc) if callable(target) else doc.get(target, target)

    def doc_to_choice(self, doc):
        return self.config.doc_to_choice


DOCS = [{"image": RED, "question": "red?", "answer": "yes", "key": "a"},
        {"image": BLUE, "question": "blue?", "answer": "no", "key": "b"}]  # fmt: skip


@pytest.fixture
def tasks(monkeypatch):
    """The tasks of a stand-in for lmms-eval, by name; `several` is a group."""
    found = {"shapes": Task(DOCS)}

    class TaskManager:
        def __init__(self, include_path=None, include_defaults=True):
            self.all_subtasks, self.all_groups, self.all_tags = list(found), ["several"], []
            self.all_tasks = [*found, "several"]

    def get_task_dict(names, manager):
        if isinstance(found[names[0]], Exception):
            raise RuntimeError("gave up") from found[names[0]]
        return {name: found[name] for name in names}

    stand_in = SimpleNamespace(TaskManager=TaskManager, get_task_dict=get_task_dict)
    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace(tasks=stand_in))
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", stand_in)
    monkeypatch.setattr(adapter, "version", lambda name: "9.9")
    adapter._task.cache_clear()
    yield found
    adapter._task.cache_clear()


def load(tasks, docs=DOCS, fields=None, **values):
    tasks["shapes"] = Task(docs, **values)
    adapter._task.cache_clear()
    return DataSource("lmms-eval:shapes", fields or {}).load("test")


def test_image_prompt_and_target_become_a_sample(tasks):
    source = DataSource("lmms-eval:shapes")
    source.check("test")
    samples = source.load("test")
    assert samples[0] == Sample(0, (RED,), "red? Briefly.", ("yes",))
    assert [s.id for s in samples] == [0, 1] and samples[-1].where == "lmms-eval:shapes document 1"
    assert [s.answer for s in samples[:2]] == ["yes", "no"]
    assert len(source.load("test", limit=1)) == 1
    with pytest.raises(ValueError, match="is one set of records: training and testing"):
        source.load("train")
    with pytest.raises(ValueError, match="without a split 'val'; leave out --split"):
        DataSource("lmms-eval:shapes", split="val").load("test")


@pytest.mark.parametrize(
    ("doc", "values", "references", "choices"),
    [
        ({"answer": ["a cat", "one cat"]}, {}, ("a cat", "one cat"), ()),
        ({"answers": [{"answer": "a"}, {"answer": "b"}]}, {}, ("a", "b"), ()),  # a target that is no column
        ({"caption": ["a cat"]}, {}, ("a cat",), ()),
        ({"answer": None}, {}, (), ()),
        ({"answer": ""}, {}, (), ()),
        ({"answer": 1}, {"choices": ["red", "blue"]}, ("blue",), ("red", "blue")),
        ({"answer": "red"}, {"choices": ["red", "blue"]}, ("red",), ("red", "blue")),
        ({"answer": "A"}, {"choices": ["red", "blue"]}, ("A",), ()),
        ({"label": 3}, {"target": lambda doc: doc["label"]}, ("3",), ()),
    ],
)
def test_targets_of_each_kind(tasks, doc, values, references, choices):
    sample = load(tasks, [{"image": RED, "question": "?", **doc}], **values)[0]
    assert (sample.references, sample.choices) == (references, choices)


def test_columns_replace_what_the_task_makes(tasks):
    samples = load(tasks, fields={"id": "key", "question": "question", "answer": "key"})
    assert [(s.id, s.prompt, s.references) for s in samples] == [("a", "red?", ("a",)), ("b", "blue?", ("b",))]
    with pytest.raises(ValueError, match=r"no column 'keys', which --map id=keys names; expected one of image, que"):
        load(tasks, fields={"id": "keys"})
    with pytest.raises(ValueError, match=r"sample 'a' \(.*document 1\): .*document 0 has the same id"):
        load(tasks, [DOCS[0], DOCS[0]], fields={"id": "key"})


@pytest.mark.parametrize("shown, images", [(None, 0), ([], 0), ([RED, BLUE], 2), (RED, 1)])
def test_any_number_of_images(tasks, shown, images):
    assert len(load(tasks, visual=lambda doc: shown)[0].images) == images


def test_documents_that_a_task_cannot_read_are_named(tasks):
    with pytest.raises(ValueError, match="lmms-eval:shapes document 1: doc_to_text fails: KeyError: 'question'"):
        load(tasks, [DOCS[0], {"image": RED}])[1]
    with pytest.raises(ValueError, match="document 0: doc_to_visual fails: KeyError: 'image'"):
        load(tasks, [{"question": "?"}])[0]
    with pytest.raises(ValueError, match=r"document 0 .*: answer is \{'x': 1\} \(dict\); expected a text"):
        load(tasks, [{**DOCS[0], "answer": {"x": 1}}])[0]
    with pytest.raises(ValueError, match=r"document 0 .*: images\[0\] is 7 \(int\)|images is a list of numbers"):
        load(tasks, visual=lambda doc: [7])[0]


def test_tasks_that_there_are_not(tasks, tmp_path):
    with pytest.raises(ValueError, match=r"lmms-eval:shape: shape is no task of lmms-eval 9\.9; .* such as shapes$"):
        DataSource("lmms-eval:shape").load("test")
    with pytest.raises(ValueError, match="several is a group of tasks"):
        DataSource("lmms-eval:several").load("test")
    tasks["gone"] = ConnectionError("the hub\nis away")
    with pytest.raises(ValueError, match=r"^lmms-eval:gone cannot be read: the hub is away$"):
        DataSource("lmms-eval:gone").load("test")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; expected one with task files"):
        DataSource(f"lmms-eval:shapes:{tmp_path}/nowhere").check()
    for name in ("", ":x", "shapes:"):
        with pytest.raises(ValueError, match="names no task; expected lmms-eval:TASK"):
            DataSource(f"lmms-eval:{name}").check()


def test_the_fingerprint_is_that_of_the_documents(tasks):
    before = DataSource("lmms-eval:shapes").fingerprint()
    load(tasks, DOCS[:1])
    assert DataSource("lmms-eval:shapes").fingerprint() != before


def test_a_package_that_cannot_be_imported_is_named(tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(ValueError, match="lmms-eval:shapes: the package lmms-eval cannot be imported: "):
        DataSource("lmms-eval:shapes").load("test")


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_it_is_named():
    with pytest.raises(ValueError, match=r"lmms-eval:x needs the package lmms-eval: pip install 'cmai-fast\[lmms-eval"):
        DataSource("lmms-eval:x").check()
