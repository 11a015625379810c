"""docs/data.md: its examples load, and it names every format and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from cmai_fast.data.formats import FORMATS
from cmai_fast.data.records import KEYS
from cmai_fast.data.sources import DataSource

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(jsonl|json|csv|python)\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("red", "blue"):
        Image.new("RGB", (4, 4), name).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("kind, text", [e for e in EXAMPLES if e[0] != "python"])
def test_examples_of_records_load(kind, text, folder):
    (folder / f"x.{kind}").write_text(text, encoding="utf-8")
    source = DataSource(f"x.{kind}")
    source.check(answers=True)
    samples = source.load("test")
    assert len(samples) == 2 and all(s.images and s.prompt for s in samples)


def test_examples_of_code_run(folder, monkeypatch):
    monkeypatch.setattr(FORMATS, "_things", dict(FORMATS._things))
    lines = [f'{{"text": "q{i}?", "answer": "a"}}' for i in range(30)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    (folder / "x.pipes").write_text("what?|red\n")
    codes = [text for kind, text in EXAMPLES if kind == "python"]
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "docs/data.md", "exec"), {})
    assert DataSource("x.pipes").load("test")[0].answer == "red"


def test_formats_keys_and_suffixes_are_named():
    for name, form in FORMATS.items():
        assert f"`{name}`" in DOC
        assert all(suffix in DOC for suffix in form.suffixes)
    assert all(f"`{key}`" in DOC for key in KEYS)
