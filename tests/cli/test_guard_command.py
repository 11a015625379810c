"""`cmai-fast guard` with a real, tiny model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from cmai_fast.arm import Decision, Guard
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import load_dataset

QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory):
    """A run, as `immunize` writes it, and x.png."""
    folder = tmp_path_factory.mktemp("run")
    model, processor = make_tiny()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    width = model.config.text_config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = ConsistencyHeads(width, width, dim=8, hidden=16)
    heads.save_pretrained(folder / "cmcv", Threshold(-1.0, 0.05, 100, "calibration"))
    Image.fromarray(load_dataset("easyvqa", "test", limit=1)[0]["image"]).save(folder / "x.png")
    return folder


def guard(run, folder, image, *options):
    return run("guard", "--model", folder, "--image", image, "--text", QUESTION, *options)


def test_the_decision_is_the_only_line_on_stdout(run, folder):
    done = guard(run, folder / "model", folder / "x.png")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("}\n")
    expected = Guard.from_pretrained(folder).decide(folder / "x.png", QUESTION)
    assert expected.route == "answer"
    assert Decision(**json.loads(done.stdout)) == expected


def test_a_higher_threshold_rejects(run, folder):
    done = guard(run, folder, folder / "x.png", "--threshold", 1.5)
    decision = Decision(**json.loads(done.stdout))
    assert done.exit_code == 0
    assert decision == dataclasses.replace(decision, route="reject", answer=None, threshold=1.5)


def test_an_image_of_another_size_is_refused_unless_resized(run, folder, tmp_path):
    with Image.open(folder / "x.png") as picture:
        picture.resize((96, 80)).save(tmp_path / "large.png")
    refused = guard(run, folder, "large.png")
    assert refused.exit_code == 2 and "80 x 96" in refused.stderr and not refused.stdout
    assert guard(run, folder, "large.png", "--resize").exit_code == 0


def test_bad_images_and_questions_are_named(run, folder, tmp_path):
    whole = (folder / "x.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for image, message in (("cut.png", "cut.png"), ("none.png", "none.png")):
        done = guard(run, folder, image)
        assert done.exit_code == 2 and message in done.stderr.splitlines()[-1] and not done.stdout
    done = run("guard", "--model", folder, "--image", folder / "x.png", "--text", " ")
    assert done.exit_code == 2 and "question 0" in done.stderr


def test_a_model_that_is_not_there(run, folder):
    done = guard(run, "no-such-model", folder / "x.png")
    assert done.exit_code == 2 and "unknown model 'no-such-model'" in done.stderr
