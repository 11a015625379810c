"""`hf:REPO` against a stand-in for `datasets`, and its absence."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from cmai_fast.data import Sample
from cmai_fast.data.formats.hf import HubSamples
from cmai_fast.data.sources import DataSource


@dataclass
class Image:
    decode: bool = True


@dataclass
class Value:
    dtype: str = "string"


@dataclass
class List:
    feature: Any


@dataclass
class ClassLabel:
    names: list[str]

    def int2str(self, value: int) -> str:
        if not 0 <= value < len(self.names):
            raise ValueError(value)
        return self.names[value]


@dataclass
class Dataset:
    """Rows with features, as far as they are used; a picture that is decoded fails the test."""

    rows: list[dict[str, Any]]
    features: dict[str, Any]
    _fingerprint: str = "f0"
    read: list[str] = field(default_factory=list)

    def cast_column(self, column: str, feature: Any) -> Dataset:
        return Dataset(self.rows, self.features | {column: feature}, self._fingerprint, self.read)

    def remove_columns(self, columns: list[str]) -> Dataset:
        kept = {k: v for k, v in self.features.items() if k not in columns}
        return Dataset([{k: r[k] for k in kept} for r in self.rows], kept, self._fingerprint, self.read)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert not any(getattr(f, "decode", getattr(getattr(f, "feature", None), "decode", 0)) for f in
                       self.features.values())  # fmt: skip
        self.read.append(f"{index}: {', '.join(self.features)}")
        return dict(self.rows[index])

    def __iter__(self):
        return (self[i] for i in range(len(self)))


PNG = {"bytes": b"\x89PNG", "path": None}
ROWS = [
    {"image": PNG, "question": "a?", "kind": 0},
    {"image": PNG, "question": "b?", "kind": 1},
    {"image": None, "question": "c?", "kind": 1},
]
FEATURES = {"image": Image(), "question": Value(), "kind": ClassLabel(["cat", "dog"])}


@pytest.fixture
def hub(monkeypatch):
    """`datasets` with one set; `hub.splits` are its splits."""
    asked: list[tuple[Any, ...]] = []
    module = SimpleNamespace(Image=Image, ClassLabel=ClassLabel, asked=asked, splits={"train": Dataset(ROWS, FEATURES)})

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return module.splits if split is None else module.splits[split]

    def get_dataset_split_names(path, config_name=None):
        if path == "gone":
            raise ConnectionError("no such data set")
        return list(module.splits)

    module.load_dataset, module.get_dataset_split_names = load_dataset, get_dataset_split_names
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_rows_become_samples_when_they_are_asked_for(hub):
    source = DataSource("hf:me/set:en", {"answer": "kind"})
    source.check()
    assert hub.asked == []  # nothing of the network
    samples = source.load("test")
    assert hub.asked == [("me/set", "en", "train")]
    assert isinstance(samples, HubSamples) and len(samples) == 3
    read = hub.splits["train"].read
    assert read == [*(f"{i}: question, kind" for i in range(3)), "0: image, question, kind"]
    assert samples[1] == Sample(1, (PNG,), "b?", ("dog",))
    assert samples[2].images == () and samples[-1].prompt == "c?" and samples[1].where == "hf:me/set:en train row 2"
    assert [s.prompt for s in samples[:2]] == ["a?", "b?"]
    with pytest.raises(IndexError):
        samples[3]


def test_splits_have_their_own_names_or_are_made(hub):
    hub.splits |= {"validation": Dataset(ROWS[:1], FEATURES), "test": Dataset(ROWS[:2], FEATURES)}
    source = DataSource("hf:me/set")
    assert [len(source.load(s)) for s in ("train", "calibration", "test")] == [3, 1, 2]
    assert hub.asked[1] == ("me/set", None, "validation")
    with pytest.raises(ValueError, match="leave out --split-seed"):
        DataSource("hf:me/set", split_seed=0).load("test")
    rows = [{"image": {"bytes": b"%d" % (i // 2), "path": None}, "question": "q?"} for i in range(20)]
    hub.splits = {"train": Dataset(rows, {"image": Image(), "question": Value()})}
    parts = [DataSource("hf:me/set", split_seed=0).load(s) for s in ("train", "calibration", "test")]
    assert [len(p) for p in parts] == [16, 2, 2]
    with pytest.raises(ValueError, match="one set of records"):
        DataSource("hf:me/set").load("train")


@pytest.mark.parametrize("several", [List(Image()), [Image()]], ids=["List", "list"])
def test_lists_of_pictures_and_other_names(hub, several):
    rows = [{"photos": [PNG, PNG], "ask": "a?", "n": "x"}]
    hub.splits = {"train": Dataset(rows, {"photos": several, "ask": Value(), "n": Value()})}
    source = DataSource("hf:me/set", {"images": "photos", "question": "ask", "id": "n"})
    if several == [Image()]:
        hub.splits["train"].__class__ = type("Old", (Dataset,), {"__getitem__": lambda self, i: dict(self.rows[i])})
    assert source.load("test")[0] == Sample("x", (PNG, PNG), "a?")


def test_what_is_broken_is_named_with_its_row(hub):
    hub.splits = {"train": Dataset([*ROWS, {"image": PNG, "question": None, "kind": 0}], FEATURES)}
    with pytest.raises(ValueError, match="hf:me/set train row 4: question is empty"):
        DataSource("hf:me/set").load("test")
    hub.splits = {"train": Dataset([{"image": PNG, "question": "a?", "kind": -1}], FEATURES)}
    assert DataSource("hf:me/set").load("test")[0].references == ()
    with pytest.raises(ValueError, match="hf:me/set train row 1: answer is None"):  # -1: a test split without labels
        DataSource("hf:me/set", {"answer": "kind"}).load("test")
    rows = [{"photo": PNG, "question": "a?"}]
    hub.splits = {"train": Dataset(rows, {"photo": Image(), "question": Value()})}
    with pytest.raises(ValueError, match=r"no image, but photo is .* --map image=photo"):
        DataSource("hf:me/set").load("test")
    with pytest.raises(ValueError, match="hf:gone cannot be read: no such data set"):
        DataSource("hf:gone").load("test")


def test_the_fingerprint_is_that_of_the_rows(hub):
    before = DataSource("hf:me/set").fingerprint()
    hub.splits["train"]._fingerprint = "f1"
    assert DataSource("hf:me/set").fingerprint() != before


@pytest.mark.parametrize("name", ["hf:", "hf::en", "hf:a:b:c"])
def test_names_that_are_none(name, hub):
    with pytest.raises(ValueError, match="expected hf:REPO or hf:REPO:CONFIG"):
        DataSource(name).check()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_without_datasets_it_is_named():
    with pytest.raises(ValueError, match=r"hf:me/set needs the package datasets: pip install 'cmai-fast\[datasets\]'"):
        DataSource("hf:me/set").check()
