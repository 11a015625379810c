"""The commands and programs of docs/guard.md run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from cmai_fast.arm.policies import POLICIES
from cmai_fast.cli import app
from cmai_fast.data import load_dataset
from cmai_fast.workflows import calibrate
from shortened import shorten_training_data

DOC = Path(__file__).parents[1] / "docs" / "guard.md"


def test_commands_and_programs_of_the_page_run(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "VERIFIER_STEPS", 2)
    shorten_training_data(monkeypatch)
    for name in ("OMP_WAIT_POLICY", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "error")  # the command sets what is not set
    sample = load_dataset("easyvqa", "test", limit=1)[0]
    Image.fromarray(sample.images[0]).resize((200, 150)).save("photo.png")
    Path("question.txt").write_text("what color is the shape?\n")
    Path("cases.jsonl").write_text(json.dumps({"id": "a", "image": "photo.png", "question": "is it red?"}))
    blocks = re.findall(r"```(sh|python)\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.S)
    printed = []
    for line in (line for kind, block in blocks if kind == "sh" for line in block.splitlines()):
        typed = shlex.split(line)[1:] + (["--limit", "20"] if " calibrate " in line else [])  # which is quick
        done = CliRunner().invoke(app, typed)
        assert done.exit_code == 0, (line, done.output)
        printed.append(done.stdout)
    assert printed[1] == printed[2], "the same question"
    assert json.loads(Path("decisions.jsonl").read_text())["id"] == "a"
    names: dict = {}
    try:
        for kind, block in blocks:
            if kind == "python":
                exec(block, names)
        assert len(names["decisions"]) == 2 and "ask-again" in POLICIES
        guard = names["Guard"](names["guard"].pipeline, ("ask-again",), threshold=100.0)
        case = guard.decide("photo.png", "is it red?")
        assert case.route == "ask-again" and case.answer is not None
    finally:
        POLICIES._things.pop("ask-again", None)
