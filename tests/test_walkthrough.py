"""docs/walkthrough.md, as a user would follow it: thirty pictures of their own, a model folder, five commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from cmai_fast.cli import app
from cmai_fast.data import load_dataset
from cmai_fast.models import resolve
from cmai_fast.workflows import training
from shortened import shorten_checks

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("cmai-fast ")]


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty photos of several sizes and formats with one question each, and a model without consistency heads."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve("easyvqa-llava"), tmp_path / "my-model", ignore=shutil.ignore_patterns("cmcv"))
    (tmp_path / "photos").mkdir()
    data, lines, seen = load_dataset("easyvqa", "test"), [], set()
    for sample in (data[i] for i in range(len(data))):
        picture = sample.images[0].tobytes()
        if picture in seen:
            continue
        seen.add(picture)
        i = len(lines)
        size = [(64, 64), (96, 96), (200, 200)][i % 3]
        name = f"photos/{i}.{'png' if i % 2 else 'jpg'}"
        Image.fromarray(sample.images[0]).resize(size, Image.Resampling.NEAREST).save(tmp_path / name, quality=95)
        lines.append({"id": f"photo-{i}", "image": name, "question": sample.prompt, "answer": sample.answer})
        if i % 2:  # half of them say what there was to choose from
            lines[-1]["choices"] = list(sample.choices)
        if len(lines) == 30:
            break
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_page_runs_as_written(users_folder: Path, monkeypatch: pytest.MonkeyPatch):
    # The commands to the letter. What no option sets is shorter: the fit of a verifier, the attacks of checks.
    monkeypatch.setattr(training, "HEAD_STEPS", 30)
    shorten_checks(monkeypatch)
    steps = commands()
    assert [shlex.split(c)[1] for c in steps] == ["attack", "immunize", "evaluate", "calibrate", "guard"]
    for command in steps:
        result = CliRunner().invoke(app, [*shlex.split(command)[1:], *quiet(command)])
        assert result.exit_code == 0, f"{command}\n{result.output}"

    attack = json.loads((users_folder / "attack.json").read_text())
    assert attack["n"] == 30 and len(attack["per_sample"]) == 30
    assert attack["acc_clean"] > 0.8 and attack["asr"] > 0  # it reads its own kind of pictures, and it breaks
    assert len(list((users_folder / "attacked").glob("*.png"))) > 0

    results = json.loads((users_folder / "evaluation" / "results.json").read_text())
    assert [m["role"] for m in results["models"]] == ["undefended", "immunised"]
    trained_and_tested = {
        record["id"] for record in map(json.loads, (users_folder / "my.jsonl").read_text().splitlines())
    }
    assert set(results["sample_ids"]) < trained_and_tested  # the test records alone
    for page in ("run/report.html", "evaluation/report.html"):
        assert "my-model" in (users_folder / page).read_text()

    decisions = [json.loads(line) for line in (users_folder / "decisions.jsonl").read_text().splitlines()]
    assert [d["id"] for d in decisions] == [f"photo-{i}" for i in range(30)]
    assert {d["route"] for d in decisions} <= {"answer", "reject"}


def quiet(command: str) -> list[str]:
    return [] if command.split()[1] in ("guard",) else ["--no-progress"]
