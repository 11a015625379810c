"""One attack: the record, the images as PNG, standard output, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.data.sources import DataSource
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.attack import attack
from fitted import colours

THREAT, DATA = ThreatModel("linf", 64 / 255), DataSource("easyvqa")


def go(folder, out, **changes):
    arguments = {
        "model": str(folder), "data": DATA, "attack": "pgd", "threat": THREAT, "steps": 4, "restarts": 1,
        "limit": 6, "seed": 3, "batch_size": 4, "out": out, "progress": False, "command": "cmai-fast attack",
    }  # fmt: skip
    return attack(**{**arguments, **changes})


def test_one_file_and_the_attacked_images(few, fitted_folder, tmp_path):
    record = go(fitted_folder, tmp_path / "deep" / "a.json", save_images=tmp_path / "png")
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == json.loads(json.dumps(record))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]
    assert {"acc_clean", "acc_robust", "acc_robust_8bit", "asr", "n", "passes", "seconds", "versions"} <= set(record)
    assert record["settings"]["attack"] == "pgd" and record["settings"]["steps"] == 4 and record["seed"] == 3
    samples, rows = colours()[::2], record["per_sample"]
    assert record["n"] == record["attacked"] == len(rows) == 6
    assert [r["prediction_clean"] for r in rows] == [s.answer for s in samples]
    assert [r["right_adv"] for r in rows] == [r["prediction_adv"] == r["answer"] for r in rows]
    assert record["acc_robust"] == np.mean([r["right_adv"] for r in rows]) < 1
    assert record["metrics"]["robust"] == {"exact-match": pytest.approx(record["acc_robust"])}

    manifest = [json.loads(line) for line in (tmp_path / "png" / "manifest.jsonl").read_text().splitlines()]
    assert [m["id"] for m in manifest] == [s.id for s in samples]
    assert {p.name for p in (tmp_path / "png").iterdir()} == {
        "manifest.jsonl",
        "set.json",
        *(f for m in manifest for f in m["files"] + m["clean_files"]),
    }
    pipeline = Pipeline.load(str(fitted_folder))
    for line, sample, row in zip(manifest, samples, rows, strict=True):
        picture = np.asarray(Image.open(tmp_path / "png" / line["files"][0]))
        assert picture.dtype == np.uint8 and 0 < np.abs(picture.astype(int) - sample.images[0]).max() <= 64
        # What is saved is what the model answered to.
        pixels = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]
        assert pipeline.generate([sample], [pixels]) == [line["adversarial_prediction"]]
        assert line["adversarial_prediction"] == row["prediction_adv_8bit"] and line["eps"] == THREAT.eps
        assert line["broken"] == (line["adversarial_prediction"] != sample.answer)
        assert line["references"] == list(sample.references) and line["clean_prediction"] == sample.answer
    assert any(m["broken"] for m in manifest)


def test_a_target_is_recorded_beside_what_broke(few, fitted_folder, tmp_path):
    record = go(fitted_folder, tmp_path / "a.json", target="red", steps=8, save_images=tmp_path / "png")
    rows = record["per_sample"]
    assert record["settings"]["target"] == "red" and record["attacked"] == 5 == sum(r["attacked"] for r in rows)
    assert [r["attacked"] for r in rows] == [r["answer"] != "red" for r in rows]
    assert [r["reached"] for r in rows] == [r["prediction_adv"] == "red" for r in rows]
    assert record["reached"] == sum(r["reached"] for r in rows) > 0
    assert record["asr_target"] == record["reached"] / 5 and record["acc_robust"] <= 1 - record["reached"] / 6
    assert all(2 <= r["forward"] <= 10 and r["backward"] < r["forward"] for r in rows if r["attacked"])
    lines = (tmp_path / "png" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["target"] for line in lines] == ["red"] * 5


def test_what_is_wrong_when_untouched_is_not_attacked(model_folder, tmp_path):
    record = go(model_folder, tmp_path / "a.json", save_images=tmp_path / "png")
    wrong = [r for r in record["per_sample"] if not r["right_clean"]]
    assert wrong and all(not r["attacked"] and r["prediction_adv"] is None and not r["right_adv"] for r in wrong)
    assert record["attacked"] == record["n"] - len(wrong)
    assert len((tmp_path / "png" / "manifest.jsonl").read_text().splitlines()) == record["attacked"]


def test_standard_output(few, fitted_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = go(fitted_folder, Path("-"), steps=1, restarts=1)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(record))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="standard output cannot be resumed"):
        go(fitted_folder, Path("-"), resume=True)


def test_refused(model_folder, tmp_path):
    (tmp_path / "there.json").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").write_text("precious")
    with pytest.raises(ValueError, match=r"there\.json exists; name another file"):
        go(model_folder, tmp_path / "there.json")
    assert (tmp_path / "there.json").read_text() == "precious"
    for changes, message in (
        ({"attack": "pgdd"}, "unknown attack 'pgdd'; did you mean pgd"),
        ({"settings": {"steep": 1}}, "pgd has no setting 'steep'"),
        ({"data": DataSource("vqa3")}, "unknown data 'vqa3'"),
        ({"model": "no-such"}, "unknown model 'no-such'"),
        ({"task": "vqaa"}, "unknown task 'vqaa'"),
        ({"steps": -1}, "steps is -1"),
        ({"target": ""}, "target is empty"),
        ({"restarts": -1}, "restarts is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"save_images": tmp_path / "full"}, "full exists and is not empty; name a new folder with --save-images"),
    ):
        with pytest.raises(ValueError, match=message):
            go(model_folder, tmp_path / "new.json", **changes)
    assert {p.name for p in tmp_path.iterdir()} == {"there.json", "full"}
    assert (tmp_path / "full" / "x.png").read_text() == "precious"
