"""results.json: written whole or not at all, and read with one message about all that is missing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmai_fast.evaluation.results import read_results, write_results
from cmai_fast.files import write_text


def small_results() -> dict[str, Any]:
    return {
        "settings": {"model": "fake", "data": "fakevqa", "eps": "8/255"},
        "versions": {},
        "seed": 0,
        "undefended": None,
        "immunised": {"acc_clean": 0.9, "acc_robust": 0.5, "asr": 0.44, "n": 10},
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"
    assert write_results(small_results(), path) == path
    assert read_results(path) == small_results()
    assert read_results(path.parent) == small_results()  # a folder stands for the file in it
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_numpy_torch_and_paths_become_plain_and_nan_becomes_null(tmp_path: Path) -> None:
    values = {
        "numpy": np.float32(0.5),
        "array": np.array([1, 2]),
        "tensor": torch.tensor([0.25, float("nan")]),
        "path": Path("a/b"),
        "asr": float("nan"),
        "loss": [float("inf"), 1.5],
        "flag": np.bool_(True),
        8: (1, "ü"),
    }
    text = write_results(values, tmp_path / "x.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == {
        "numpy": 0.5,
        "array": [1, 2],
        "tensor": [0.25, None],
        "path": "a/b",
        "asr": None,
        "loss": [None, 1.5],
        "flag": True,
        "8": [1, "ü"],
    }


def test_a_value_json_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(TypeError, match=r"results\.settings\.odd\[1\] is a object"):
        write_results({"settings": {"odd": [1, object()]}}, path)
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """A file that takes some of the text and then has no room."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, text: str) -> int:
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_on_full_disk(path: Path, mode: str, encoding: str) -> FullDisk:
        return FullDisk(path.open(mode, encoding=encoding))

    monkeypatch.setattr("cmai_fast.files.open", open_on_full_disk, raising=False)


def fail_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fault", [fill_disk, fail_fsync])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    path = tmp_path / "results.json"
    write_results(small_results(), path)
    fault(monkeypatch)
    with pytest.raises(OSError, match="No space left on device; the file that was there is unchanged") as caught:
        write_results({**small_results(), "seed": 1}, path)
    assert str(path) in str(caught.value) and caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert read_results(path) == small_results()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_ctrl_c_in_mid_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text("old", tmp_path / "a.txt")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text("new", path)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/results\.json: (Not a directory|File exists); no file was left there"):
        write_results(small_results(), tmp_path / "file" / "results.json")


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    results = small_results()
    del results["seed"], results["settings"]["eps"], results["immunised"]["acc_robust"]
    results["immunised"]["n"] = "many"
    path = write_results(results, tmp_path / "results.json")
    with pytest.raises(ValueError, match="seed is missing") as caught:
        read_results(path)
    for text in (str(path), "seed is missing", "settings.eps is missing", "immunised.acc_robust", "immunised.n"):
        assert text in str(caught.value), text


def test_two_null_models_are_no_results(tmp_path: Path) -> None:
    path = write_results({**small_results(), "immunised": None}, tmp_path / "results.json")
    with pytest.raises(ValueError, match="both null"):
        read_results(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_what_is_not_a_results_file_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(path)


def test_no_file_says_what_would_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cmai-fast immunize"):
        read_results(tmp_path)
