"""One attack, task, format, defence, policy and metric, each a file outside the package (plugin_example/)."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cmai_fast.attacks import ATTACKS
from cmai_fast.cli import app
from cmai_fast.data import load_dataset
from cmai_fast.registry import load_plugins
from cmai_fast.workflows import training
from forked import in_a_fork
from shortened import shorten_checks

TESTS = Path(__file__).parent
ADDED = {
    "attack": "grey-out", "evaluate": "first-letter", "immunize": "all-adversarial", "guard": "shrug",
}  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The plugin as pip would install it: a package, and its metadata with the entry points."""
    shutil.copytree(TESTS / "plugin_example", tmp_path / "made_up")
    (tmp_path / "made_up" / "__init__.py").touch()
    info = tmp_path / "made_up-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    modules = sorted(f.stem for f in (TESTS / "plugin_example").glob("*.py"))
    lines = [f"{name} = made_up.{name}" for name in modules]
    (info / "entry_points.txt").write_text("[cmai_fast.plugins]\n" + "\n".join(lines) + "\n")
    return tmp_path


def start_with(folder: Path) -> None:
    """As a process that starts in the folder, with the plugin installed and none loaded yet."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    load_plugins.cache_clear()


def run(folder: Path, *commands: list[str]) -> list[list[Any]]:
    """The exit code and the output of each, one after the other, with what no option sets shorter."""

    def work() -> list[list[Any]]:
        start_with(folder)
        shorten_checks(pytest.MonkeyPatch())
        training.HEAD_STEPS = 30
        results = [CliRunner(env={"COLUMNS": "200"}).invoke(app, command) for command in commands]
        return [[result.exit_code, result.output] for result in results]

    return in_a_fork(work)


def test_each_is_one_file_and_is_found_in_lists_and_in_runs(installed: Path):
    data, lines = load_dataset("easyvqa", "test"), []
    for i in range(0, 60, 4):
        Image.fromarray(data[i].images[0]).save(installed / f"{i}.png")
        lines.append(";".join([f"{i}.png", data[i].prompt, data[i].answer, *data[i].choices]))
    (installed / "cases.semi").write_text("\n".join(lines))
    of = ["--model", "easyvqa-llava", "--data", "cases.semi"]
    few = ["--limit", "4", "--no-progress"]
    outputs = run(
        installed,
        *([command, "--list"] for command in ADDED),
        ["attack", *of, "--attack", "grey-out", "--set", "shade=0.25", "--eps", "0.5", *few, "--out", "a.json"],
        ["evaluate", *of, "--task", "first-letter", "--metric", "mean-length", "--eps", "0.5", "--steps", "1",
         "--restarts", "1", *few, "--out", "e"],
        ["immunize", *of, "--split-seed", "0", "--defence", "all-adversarial", "--max-steps", "1", "--batch-size", "2",
         "--attack-steps", "1", "--restarts", "1", *few, "--out", "i"],
        ["guard", *of, "--policy", "shrug", "--threshold", "100", "--out", "g.jsonl"],
    )  # fmt: skip
    assert [code for code, _ in outputs] == [0] * 8, outputs
    for (command, name), (_, listed) in zip(ADDED.items(), outputs, strict=False):
        assert name in listed, command
    assert all(name in outputs[1][1] for name in ("semicolons", "mean-length"))

    attack = json.loads((installed / "a.json").read_text())
    assert attack["settings"]["attack"] == "grey-out" and attack["n"] == 4
    evaluation = json.loads((installed / "e" / "results.json").read_text())["models"][0]
    assert set(evaluation["metrics"]["clean"]) >= {"letters", "mean-length"}
    assert evaluation["metrics"]["clean"]["mean-length"] > 1
    training = json.loads((installed / "i" / "results.json").read_text())
    assert training["settings"]["defence"] == "all-adversarial"
    decisions = [json.loads(line) for line in (installed / "g.jsonl").read_text().splitlines()]
    assert len(decisions) == 15 and {d["answer"] for d in decisions} == {"I do not know"}


def test_a_broken_plugin_is_named_and_left_out(installed: Path):
    (installed / "made_up" / "metric.py").write_text("import no_such_module\n")

    def work() -> list[list[str]]:
        start_with(installed)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            names = ATTACKS.names()
        return [[str(warning.message) for warning in found], names]

    said, names = in_a_fork(work)
    assert "plugin metric (made_up.metric) cannot be loaded: No module named 'no_such_module'" in said
    assert "grey-out" in names
