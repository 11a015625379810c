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

from cmai_fast.evaluation.results import check_results, read_results, upgrade_results, write_results
from cmai_fast.files import write_text
from cmai_fast.report import render_report

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "easyvqa"


def small_results() -> dict[str, Any]:
    return {
        "schema": 2,
        "settings": {"model": "fake", "data": "fakevqa", "eps": "8/255"},
        "versions": {},
        "seed": 0,
        "models": [{"name": "fake", "role": "immunised", "acc_clean": 0.9, "acc_robust": 0.5, "asr": 0.44, "n": 10}],
    }


def old_results() -> dict[str, Any]:
    """The same in schema 1, with both models and a picture."""
    record = {"acc_clean": 0.9, "acc_robust": 0.5, "n": 10}
    picture = {"question": "?", "against": "undefended", "undefended": {"clean": "a"}, "immunised": {"clean": "b"}}
    return {
        "settings": {"model": "fake-immune", "against": "fake", "data": "fakevqa", "eps": 0.1},
        "versions": {},
        "seed": 0,
        "undefended": record,
        "immunised": record | {"acc_robust": 0.8},
        "pictures": [picture],
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

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_on_full_disk(path: Path, mode: str) -> FullDisk:
        return FullDisk(path.open(mode))

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
    del results["seed"], results["settings"]["eps"], results["models"][0]["acc_robust"]
    results["models"][0]["n"] = "many"
    path = write_results(results, tmp_path / "results.json")
    with pytest.raises(ValueError, match="seed is missing") as caught:
        read_results(path)
    for text in (str(path), "seed is missing", "settings.eps is missing", "models[0].acc_robust", "models[0].n"):
        assert text in str(caught.value), text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": []}, "models is empty"),
        ({"models": {}}, "models is not a list"),
        ({"models": [7]}, r"models\[0\] is not an object"),
        ({"models": [{"name": " "}]}, r"models\[0\]\.name is missing or not a text"),
        ({"models": [{"role": "cured"}]}, r"models\[0\]\.role is 'cured', expected one of undefended, immunised, base"),
        ({"models": [{"attacks": []}]}, r"models\[0\]\.attacks is not an object"),
        ({"models": [{"attacks": {"pgd": 3}}]}, r"models\[0\]\.attacks holds something that is not an object"),
        ({"models": [{"sanity": ["fine"]}]}, r"models\[0\]\.sanity holds something that is not an object"),
        ({"models": [{"curve": [{"eps": "8/0"}]}]}, r"models\[0\]\.curve has a point without eps"),
        ({"settings": {"data": "d", "eps": "much"}}, "settings.eps is 'much', expected a number"),
        ({"settings": []}, "settings is not an object"),
        ({"pictures": {}}, "pictures is not a list"),
        ({"training": [1]}, "training is not an object"),
        ({"schema": None}, r"have schema None, and this version reads"),
    ],
)
def test_what_has_another_shape_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_results(small_results() | change)


def test_two_models_of_one_name_are_refused() -> None:
    results = small_results()
    results["models"] *= 2
    with pytest.raises(ValueError, match=r"models\[1\]\.name 'fake' is also the name of another model"):
        check_results(results)


@pytest.mark.parametrize(
    "schema, message",
    [
        (3, "have schema 3, and this version reads up to 2; update"),
        ("new", "have schema 'new'.*run the evaluation again"),
    ],
)
def test_an_unknown_schema_is_refused_by_name(tmp_path: Path, schema: Any, message: str) -> None:
    path = write_results({"schema": schema, "something": "else"}, tmp_path / "results.json")
    with pytest.raises(ValueError, match=rf"results\.json: these results {message}"):
        read_results(path)


def test_schema_1_of_two_models_is_upgraded_and_left_as_it_was() -> None:
    old = old_results()
    new = upgrade_results(old)
    assert old == old_results()
    assert new["schema"] == 2 and "undefended" not in new and "immunised" not in new
    assert [(m["name"], m["role"], m["path"], m["acc_robust"]) for m in new["models"]] == [
        ("undefended", "undefended", "fake", 0.5),
        ("immunised", "immunised", "fake-immune", 0.8),
    ]
    answers = {"undefended": {"clean": "a"}, "immunised": {"clean": "b"}}
    assert new["pictures"] == [{"question": "?", "against": "undefended", "answers": answers}]
    assert upgrade_results(new) == new


def test_schema_1_of_one_model_names_it_by_what_was_evaluated() -> None:
    old = old_results() | {"undefended": None}
    old["pictures"] = [{"against": "immunised", "immunised": {"clean": "b"}}]
    new = upgrade_results(old)
    assert [(m["name"], m["path"]) for m in new["models"]] == [("fake-immune", "fake-immune")]
    assert new["pictures"] == [{"against": "fake-immune", "answers": {"fake-immune": {"clean": "b"}}}]


def test_schema_1_without_a_model_or_with_a_broken_one_is_refused() -> None:
    with pytest.raises(ValueError, match="models is empty"):
        upgrade_results(old_results() | {"undefended": None, "immunised": None})
    with pytest.raises(ValueError, match=r"models\[1\] is not an object"):
        upgrade_results(old_results() | {"immunised": 3})
    with pytest.raises(ValueError, match=r"models\[1\]\.n is missing"):
        upgrade_results(old_results() | {"immunised": {"acc_clean": 1.0, "acc_robust": 1.0}})


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*/*.json")), ids=lambda path: path.stem)
def test_committed_results_are_read_and_rendered(path: Path) -> None:
    results = read_results(path)
    page = render_report(results)
    for model in results["models"]:
        assert f"{100 * model['acc_robust']:.1f}%" in page and model["name"] in page


def test_committed_runs_stand_side_by_side_in_one_report() -> None:
    runs = [read_results(path) for path in sorted((COMMITTED / "runs").glob("*-seed0.json"))]
    together = runs[0] | {"models": [model for run in runs for model in run["models"]]}
    assert len(together["models"]) > 8
    assert "Leaderboard" in render_report(together)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_what_is_not_a_results_file_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(path)


def test_no_file_says_what_would_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cmai-fast immunize"):
        read_results(tmp_path)
