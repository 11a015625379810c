"""Any number of models measured side by side, and what is refused before anything is written."""

from __future__ import annotations

import pytest

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation import comparison
from cmai_fast.evaluation.results import read_results
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.evaluate import evaluate

THREAT, DATA = ThreatModel("linf", 64 / 255), DataSource("easyvqa")
SUITE = [AttackSpec("pgd", 4), AttackSpec("pgd", 2, settings={"step_size": "8/255"})]


@pytest.fixture(scope="module")
def folders(fitted_folder, model_folder):
    """Three models: two of the same weights, in folders of other names, and one that knows nothing."""
    return str(fitted_folder), str(fitted_folder.parent), str(model_folder)


def test_three_models_side_by_side(few, folders, tmp_path, monkeypatch):
    loaded = []
    load = Pipeline.load.__func__
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, *a, **k: loaded.append(a[0]) or load(cls, *a, **k)))
    first, second, third = folders
    results = evaluate(
        third, DATA, THREAT, against=[first, second], attacks=SUITE, out=tmp_path / "out", batch_size=4, progress=False,
        command="cmai-fast evaluate", max_new_tokens=5,
    )  # fmt: skip
    assert results == read_results(tmp_path / "out") and (tmp_path / "out" / "report.html").is_file()
    assert results["schema"] == 2
    models = results["models"]
    assert [(m["name"], m["role"], m["path"]) for m in models] == [
        (first, "undefended", first), (second, "baseline", second), (third, "immunised", third),
    ]  # fmt: skip
    assert ["transfer" in m["attacks"] for m in models] == [False, True, True]
    assert list(models[0]["attacks"]) == ["pgd-4", "pgd-2[step_size=0.03137254901960784]"]
    # The same model is broken by exactly the images that broke it.
    own, moved = models[0]["attacks"]["pgd-4"], models[1]["attacks"]["transfer"]
    assert (own["attacked"], own["broken"]) == (moved["attacked"], moved["broken"]) and own["broken"] > 0
    assert (moved["strict"]["attacked"], moved["strict"]["asr"]) == (own["broken"], 1.0)
    checks = [{c["check"] for c in m["sanity"]} for m in models]
    assert ["the undefended model breaks" in names for names in checks] == [True, False, False]
    assert loaded == [first, second, third, second, first]  # the last is still there when the pictures are shown
    for picture in results["pictures"]:
        assert list(picture["answers"]) == list(folders) and picture["against"] in folders
    assert {p["against"] for p in results["pictures"]} == {first, second}  # the third is right on nothing
    settings = results["settings"]
    assert settings["against"] == [first, second] and settings["curve_attack"] == "pgd-4"
    assert settings["command"] == "cmai-fast evaluate" and settings["attacks"][1]["settings"]["step_size"] == 8 / 255
    assert len(results["sample_ids"]) == 6


def test_one_model(few, folders, tmp_path):
    results = evaluate(folders[0], DATA, THREAT, suite="quick", out=tmp_path / "out", progress=False)
    (model,) = results["models"]
    assert model["role"] == "immunised" and list(model["attacks"]) == ["pgd-10", "fgsm-1"]
    assert results["settings"]["suite"] == "quick"
    with pytest.raises(ValueError, match="the suite 'quick' and attacks are given; expected one of the two"):
        evaluate(folders[0], DATA, THREAT, suite="quick", attacks=SUITE, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert "the undefended model breaks" not in {c["check"] for c in model["sanity"]}


def test_the_adaptive_attack_joins_the_suite_of_a_guarded_model(few, verified_folder, tmp_path):
    also = [AttackSpec.parse("adaptive:3x2")]
    results = evaluate(
        str(verified_folder), DATA, THREAT, attacks=SUITE[:1], also=also, out=tmp_path / "out", progress=False
    )
    (model,) = results["models"]
    assert list(model["attacks"]) == ["pgd-4", "adaptive-3x2"]
    assert list(model["detection"]["fooled_and_accepted_by_attack"]) == ["pgd-4", "adaptive-3x2"]
    assert "left_out" not in model and model["attacks"]["adaptive-3x2"]["attacked"] > 0


def test_attacks_are_read_with_their_budgets():
    assert AttackSpec.parse("adaptive") == AttackSpec("adaptive", 100, 3)
    assert AttackSpec.parse("pgd:7") == AttackSpec("pgd", 7) and AttackSpec.parse("pgd:7x2").key == "pgd-7x2"
    with pytest.raises(ValueError, match="unknown attack 'pdg'; did you mean pgd"):
        AttackSpec.parse("pdg:7")
    for wrong in ("pgd:x2", "pgd:", "pgd:2x"):
        with pytest.raises(ValueError, match=f"attack '{wrong}': expected NAME, NAME:STEPS or NAME:STEPSxRESTARTS"):
            AttackSpec.parse(wrong)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "no-such"}, "unknown model 'no-such'"),
        ({"against": ["no-such"]}, "unknown model 'no-such'"),
        ({"against": ["easyvqa-llava"]}, "easyvqa-llava is named twice"),
        ({"data": DataSource("no-such-data")}, "unknown data 'no-such-data'"),
        ({"task": "vqqa"}, "unknown task 'vqqa'; did you mean vqa"),
        ({"metrics": ["bluu"]}, "unknown metric 'bluu'"),
        ({"steps": 0}, "steps is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"device": "gpu"}, "gpu"),
        ({"also": [AttackSpec("pgd", 50, 2)]}, "the suite has pgd-50x2 twice"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(comparison, "compare", lambda *a, **k: 1 / 0)
    arguments = {"model": "easyvqa-llava", "data": DATA, "threat": THREAT, "out": tmp_path / "out"} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(ValueError, match="exists and is not empty"):
            evaluate("easyvqa-llava", DATA, THREAT, out=tmp_path, resume=resume, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
