"""A threshold holds for the model and processor that it was set with."""

from __future__ import annotations

import copy

import pytest
import torch

from cmai_fast.cmcv import Threshold
from cmai_fast.cmcv.fingerprint import changed, fingerprint
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import load_dataset
from cmai_fast.pipeline import Pipeline


@pytest.fixture
def parts(make_tiny):
    return make_tiny()


def test_it_is_that_of_the_weights_in_either_precision_and_after_saving(parts, tmp_path):
    model, processor = parts
    own = fingerprint(model, processor)
    assert fingerprint(copy.deepcopy(model).bfloat16(), processor) == own
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = Pipeline.load(tmp_path)
    assert fingerprint(loaded.model, loaded.processor) == own
    half = fingerprint(copy.deepcopy(model).half(), processor)
    assert half == {"processor": own["processor"]} and changed(own, half) == []


@pytest.mark.parametrize("what", ["every weight", "mean", "size", "template"])
def test_it_knows_what_changed(parts, make_tiny, what):
    model, processor = parts
    own = fingerprint(model, processor)
    other, theirs = make_tiny()
    if what == "every weight":
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.05)
    elif what == "mean":
        theirs.image_processor.image_mean = [0.5, 0.5, 0.5]
    elif what == "size":
        theirs.image_processor.size = {"height": 32, "width": 32}
    else:
        theirs.chat_template = "{{ messages }}"
    expected = ["weights"] if what == "every weight" else ["processor"]
    assert changed(own, fingerprint(other, theirs)) == expected


def test_a_pipeline_refuses_the_threshold_of_another_model(parts, make_tiny, tmp_path):
    model, processor = parts
    verifier = Verifier.for_data(model, processor, load_dataset("easyvqa", "train")[:4], width=16, heads=2)
    threshold = Threshold(0.0, 0.05, 10, "calibration", fingerprint=fingerprint(model, processor))
    verifier.save_pretrained(tmp_path / "cmcv", threshold)
    model.save_pretrained(tmp_path / "own")
    other, _ = make_tiny(seed=5)
    other.save_pretrained(tmp_path / "other")
    for name in ("own", "other"):
        processor.save_pretrained(tmp_path / name)
    assert Pipeline.load(tmp_path / "own", heads=tmp_path / "cmcv").threshold == threshold
    with pytest.raises(ValueError, match=r"set with other weights than this model has; calibrate it for this model"):
        Pipeline.load(tmp_path / "other", heads=tmp_path / "cmcv")
    Pipeline.load(tmp_path / "other", heads=tmp_path / "cmcv", calibrated=False)  # a new threshold is about to be set
