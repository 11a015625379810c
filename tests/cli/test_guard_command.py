"""`cmai-fast guard` with a real, tiny model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.arm import Decision, Guard
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import load_dataset
from shortened import shorten_training_data

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
    Image.fromarray(load_dataset("easyvqa", "test", limit=1)[0].images[0]).save(folder / "x.png")
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


def test_a_photo_and_a_question_from_a_file(run, folder, tmp_path):
    with Image.open(folder / "x.png") as picture:
        picture.resize((96, 80)).save(tmp_path / "large.png")
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n")
    done = run("guard", "--model", folder, "--image", "large.png", "--text", "@q.txt")
    assert Decision(**json.loads(done.stdout)) == Guard.from_pretrained(folder).decide("large.png", QUESTION)
    done = run("guard", "--model", folder, "--image", "large.png", "--text", "@@home")
    assert json.loads(done.stdout)["question"] == "@home"


@pytest.fixture
def cases(folder, tmp_path):
    """Seven cases without answers, under other names of keys."""
    data = load_dataset("easyvqa", "test", limit=7, seed=3)
    rows = []
    for i in range(7):
        Image.fromarray(np.asarray(data[i].images[0])).resize((64 + i, 64)).save(tmp_path / f"{i}.png")
        rows.append({"id": f"case-{i}", "image": f"{i}.png", "text": data[i].prompt})
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def test_many_cases_are_json_lines_with_their_ids(run, folder, cases, tmp_path):
    command = ("guard", "--model", folder, "--data", "cases.jsonl", "--map", "question=text", "--batch-size", 3)
    done = run(*command, "--threshold", 0.1)
    assert done.exit_code == 0, done.output
    decisions = [Decision(**json.loads(line)) for line in done.stdout.splitlines()]
    assert [d.id for d in decisions] == [row["id"] for row in cases]
    alone = Guard.from_pretrained(folder, threshold=0.1)
    for decision, row in zip(decisions, cases, strict=True):
        expected = alone.decide(row["image"], row["text"])
        assert decision.score == pytest.approx(expected.score, abs=1e-5)
        assert dataclasses.replace(decision, score=0.0, id=None) == dataclasses.replace(expected, score=0.0)
    written = run(*command, "--threshold", 0.1, "--out", "d.jsonl")
    assert (tmp_path / "d.jsonl").read_text() == done.stdout
    assert written.stdout == "7 decisions: d.jsonl\n"


def test_a_case_that_fails_leaves_no_file(run, folder, cases, tmp_path):
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:90])
    done = run(
        "guard", "--model", folder, "--data", "cases.jsonl", "--map", "question=text", "--batch-size", 3, "--out", "d"
    )
    assert done.exit_code == 2 and "case-5" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d*"))


def test_guard_uses_what_calibrate_wrote(run, folder, tmp_path, monkeypatch):
    shorten_training_data(monkeypatch)
    done = run(
        "calibrate", "--model", folder, "--limit", 20, "--false-rejection-rate", 0.25, "--max-new-tokens", 3,
        "--verifier-steps", 3, "--no-progress", "--out", "cmcv",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "rejects at most 25.0% of clean inputs like the 20" in done.stdout and "cmcv" in done.stdout
    decision = json.loads(guard(run, folder, folder / "x.png", "--heads", "cmcv").stdout)
    threshold = json.loads((tmp_path / "cmcv" / "verifier.json").read_text())["threshold"]
    assert decision["threshold"] == threshold["tau"] and threshold["generation"]["max_new_tokens"] == 3
    refused = guard(run, folder, folder / "x.png", "--heads", "cmcv", "--max-new-tokens", 4)
    assert refused.exit_code == 2 and "--max-new-tokens is 4" in refused.stderr


def test_bad_images_and_questions_are_named(run, folder, tmp_path):
    whole = (folder / "x.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for image, message in (("cut.png", "cut.png"), ("none.png", "none.png")):
        done = guard(run, folder, image)
        assert done.exit_code == 2 and message in done.stderr.splitlines()[-1] and not done.stdout
    done = run("guard", "--model", folder, "--image", folder / "x.png", "--text", " ")
    assert done.exit_code == 2 and "--text is ' '; expected a question" in done.stderr


def test_a_model_that_is_not_there(run, folder):
    done = guard(run, "no-such-model", folder / "x.png")
    assert done.exit_code == 2 and "unknown model 'no-such-model'" in done.stderr


def test_policies_take_settings(run, folder):
    low = ("--threshold", 1.5, "--policy", "smooth", "--policy", "review")
    of = ("--set", "smooth.draws=3", "--set", "smooth.agreement=0.1", "--set", "review.folder=cases")
    decision = json.loads(guard(run, folder, folder / "x.png", *low, *of).stdout)
    assert decision["route"] == "smooth" and sum(decision["details"]["votes"].values()) == 3


def test_review_stores_the_case(run, folder, tmp_path):
    done = guard(
        run, folder, folder / "x.png", "--threshold", 1.5, "--policy", "review", "--set", "review.folder=cases"
    )
    decision, line = json.loads(done.stdout), json.loads((tmp_path / "cases" / "cases.jsonl").read_text())
    assert decision["answer"] is None and decision["details"]["case"] == line["case"]
    assert (tmp_path / "cases" / "images" / f"{line['images'][0]}.png").is_file()


def test_certify_adds_a_radius_to_what_is_accepted(run, folder):
    few = ("--set", "certify.n=20", "--set", "certify.n0=4", "--set", "certify.sigma=0.05")
    decision = json.loads(guard(run, folder, folder / "x.png", "--certify", *few).stdout)
    certificate = decision["details"]["certificate"]
    assert decision["route"] == "answer" and certificate["n"] == 20 and certificate["accepts"] is True
    rejected = json.loads(guard(run, folder, folder / "x.png", "--certify", "--threshold", 1.5, *few).stdout)
    assert rejected["route"] == "reject" and rejected["details"] == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (("--set", "smooth.draws=3"), "expected POLICY.SETTING with one of the policies reject"),
        (("--policy", "smooth", "--set", "smooth.draws"), "--set smooth.draws: expected NAME=VALUE"),
        (("--policy", "smooth", "--set", "smooth.drws=3"), "smooth has no setting 'drws'"),
        (("--policy", "purify", "--set", "purify.eps=8"), "purify: eps is 8"),
        (("--policy", "smoth"), "did you mean smooth"),
    ],
)
def test_bad_settings_of_policies_are_named(run, folder, options, message):
    done = guard(run, folder, folder / "x.png", *options)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()) and not done.stdout


def test_the_list_shows_settings(run):
    listed = " ".join(run("guard", "--list").stdout.split())
    assert "robust-weights" in listed and "alpha=1.0" in listed
