"""Heads and thresholds for a model as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.cmcv.encoder import Encoder
from cmai_fast.cmcv.verifier import tower_weights
from cmai_fast.data.sources import DataSource
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.workflows.calibrate import calibrate

DATA = DataSource("easyvqa")
FAST = {"limit": 24, "batch_size": 8, "head_steps": 3, "verifier_steps": 0, "progress": False, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory):
    """A model without heads."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    for part in make_tiny():
        part.save_pretrained(folder)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_heads_are_fitted_and_the_threshold_rejects_its_share(folder, tmp_path):
    record = calibrate(str(folder), DATA, out=tmp_path / "a", false_rejection_rate=0.25, **FAST)
    heads, threshold = ConsistencyHeads.from_pretrained(tmp_path / "a")
    own = Pipeline.load(str(folder), calibrated=False).fingerprint()
    assert threshold == Threshold(threshold.tau, 0.25, 24, "calibration", Generation(3), own)
    assert record["fitted"] and record["score"] == "heads" and record["threshold"] == threshold.to_dict()
    samples = DATA.load("calibration", 24, 0)
    pipeline = Pipeline.load(str(folder), heads=tmp_path / "a")
    _, scores = pipeline.answer([samples[i] for i in range(24)])
    below = threshold.tau - 1e-6  # it is one of the scores, up to rounding
    assert sum(score < below for score in scores) == 6 and pipeline.generation == Generation(3)
    assert record["wrong_answers"]["n"] == 24 and 0 <= record["wrong_answers"]["auroc"] <= 1
    assert json.loads((tmp_path / "a" / "calibration.json").read_text())["threshold"] == record["threshold"]
    assert [row["false_rejection_rate"] for row in record["thresholds"]] == [0.01, 0.05]
    assert all(row["interval"][0] <= row["tau"] <= row["interval"][1] for row in record["thresholds"])
    assert sorted(files(tmp_path / "a")) == ["calibration.json", "cmcv.json", "heads.safetensors"]
    calibrate(str(folder), DATA, out=tmp_path / "b", false_rejection_rate=0.25, **FAST)
    again, _ = ConsistencyHeads.from_pretrained(tmp_path / "b")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in heads.state_dict().items()), "the seed decides"


def test_heads_that_are_there_are_kept_unless_they_are_refitted(folder, tmp_path):
    width = Pipeline.load(str(folder)).bridge.image_dim
    own = ConsistencyHeads(width, width, dim=8, hidden=16)
    own.save_pretrained(tmp_path / "own", Threshold(0.9, 0.05, 9, "calibration", Generation(2)))
    settings = FAST | {"max_new_tokens": None}
    kept = calibrate(str(folder), DATA, out=tmp_path / "a", heads=tmp_path / "own", **settings)
    heads, threshold = ConsistencyHeads.from_pretrained(tmp_path / "a")
    assert not kept["fitted"] and heads.settings == own.settings
    assert all(torch.equal(v, heads.state_dict()[k]) for k, v in own.state_dict().items())
    assert threshold.generation == Generation(2) and threshold.tau < 0.9
    new = calibrate(str(folder), DATA, out=tmp_path / "a", heads=tmp_path / "own", refit=True, **FAST)
    heads, threshold = ConsistencyHeads.from_pretrained(tmp_path / "a")
    assert new["fitted"] and heads.settings["dim"] == 128 and threshold.generation == Generation(3)


def test_other_files_are_left_alone_and_a_failure_leaves_the_old_heads(folder, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for out, message in ((tmp_path / "mine", "holds notes.txt"), (tmp_path / "mine" / "notes.txt", "notes.txt")):
        with pytest.raises(ValueError, match=message):
            calibrate(str(folder), DATA, out=out, **FAST)
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match="false_rejection_rate is"):
            calibrate(str(folder), DATA, out=tmp_path / "a", false_rejection_rate=rate, **FAST)
    calibrate(str(folder), DATA, out=tmp_path / "a", **FAST)
    before = files(tmp_path / "a")
    monkeypatch.setattr(ConsistencyHeads, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(str(folder), DATA, out=tmp_path / "a", **FAST)
    assert files(tmp_path / "a") == before and sorted(p.name for p in tmp_path.iterdir()) == ["a", "mine"]


def test_answers_of_other_samples_are_wrong_ones_where_there_are_no_choices(folder, tmp_path, monkeypatch):
    load = DataSource.load

    def open_questions(self, split, limit=None, seed=0):
        samples = load(self, split, limit or 64, seed)
        return [replace(samples[i], choices=()) for i in range(len(samples))]

    monkeypatch.setattr(DataSource, "load", open_questions)
    record = calibrate(str(folder), DATA, out=tmp_path / "a", **FAST)
    assert record["fitted"] and record["wrong_answers"]["n"] == 24


VERIFIED = FAST | {"verifier_steps": 3}


def test_a_verifier_is_fitted_and_its_margin_is_the_score(folder, tmp_path):
    before = Pipeline.load(str(folder)).model.state_dict()
    record = calibrate(str(folder), DATA, out=tmp_path / "a", false_rejection_rate=0.25, **VERIFIED)
    assert record["score"] == "verifier" and record["verifier"]["tower"] == "copy"
    assert sorted(files(tmp_path / "a")) == ["calibration.json", "verifier.json", "verifier.safetensors"]
    pipeline = Pipeline.load(str(folder), heads=tmp_path / "a")
    assert pipeline.heads is None and pipeline.threshold.to_dict() == record["threshold"]
    assert all(torch.equal(v, before[k]) for k, v in pipeline.model.state_dict().items())
    vision = tower_weights(pipeline.verifier.bridge)
    assert any(not torch.equal(v, before[k]) for k, v in vision.items()), "the copy was hardened"
    samples = [DATA.load("calibration", 24, 0)[i] for i in range(24)]
    answers, scores = pipeline.answer(samples)
    # tau is the score of one of them, which rounding moves a little in a batch of another size.
    assert sum(score < pipeline.threshold.tau - 1e-5 for score in scores) == 6 and pipeline.generation == Generation(3)
    assert scores == pytest.approx(pipeline.score(samples, answers).tolist(), abs=1e-5)
    assert min(scores) < -1, "log-odds, not a cosine"
    kept = calibrate(str(folder), DATA, out=tmp_path / "b", heads=tmp_path / "a", **VERIFIED)
    assert (
        not kept["fitted"]
        and files(tmp_path / "b")["verifier.safetensors"] == files(tmp_path / "a")["verifier.safetensors"]
    )


@pytest.fixture
def encoder(tmp_path):
    """A vision encoder of another architecture and another size than the model's."""
    folder = tmp_path / "encoder"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        SiglipVisionModel(SiglipVisionConfig(**sizes, hidden_size=16, patch_size=8)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_verifier_sees_with_an_encoder_of_another_architecture(folder, encoder, tmp_path):
    theirs = load_file(encoder / "model.safetensors")
    record = calibrate(str(folder), DATA, out=tmp_path / "a", tower=str(encoder), **VERIFIED)
    assert record["score"] == "verifier" and record["verifier"]["tower"] == str(encoder)
    assert sorted(files(tmp_path / "a")) == ["calibration.json", "verifier.json", "verifier.safetensors"]
    shutil.rmtree(encoder)
    pipeline = Pipeline.load(str(folder), heads=tmp_path / "a")
    tower = pipeline.verifier.tower
    assert isinstance(tower, Encoder) and tower.reading.size == (32, 32)
    own = tower.encoder.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in own.items()), "left as it is"
    samples = [DATA.load("calibration", 24, 0)[i] for i in range(24)]
    answers, scores = pipeline.answer(samples)
    assert sum(score < pipeline.threshold.tau - 1e-5 for score in scores) == 1
    assert scores == pytest.approx(pipeline.score(samples, answers).tolist(), abs=1e-5)


def test_a_tower_that_is_none_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    text, out = tmp_path / "text", tmp_path / "out"
    BertConfig().save_pretrained(text)
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    for tower, message in ((text, "holds a BertConfig"), (tmp_path / "none", "unknown model")):
        with pytest.raises(ValueError, match=message):
            calibrate(str(folder), DATA, out=out, tower=str(tower), **VERIFIED)
    assert not out.exists()


def test_a_verifier_sees_with_the_model_itself_or_with_another_one(folder, make_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it is asked for again and again
    other = tmp_path / "other"
    for part in make_tiny(seed=5):
        part.save_pretrained(other)
    calibrate(str(folder), DATA, out=tmp_path / "own", tower="own", **VERIFIED)
    own = Pipeline.load(str(folder), heads=tmp_path / "own")
    assert own.verifier.tower is None and own.verifier.bridge.model is own.model
    calibrate(str(folder), DATA, out=tmp_path / "named", tower=str(other), **VERIFIED)
    named = Pipeline.load(str(folder), heads=tmp_path / "named")
    theirs = tower_weights(Pipeline.load(str(other)).bridge)
    assert all(torch.equal(v, theirs[k]) for k, v in tower_weights(named.verifier.bridge).items())
    with pytest.raises(ValueError, match="cannot load the model 'nowhere/none'"):
        calibrate(str(folder), DATA, out=tmp_path / "c", tower="nowhere/none", **VERIFIED)
    assert not (tmp_path / "c").exists()
