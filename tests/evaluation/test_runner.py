"""Batches of a run: what does not fit is done in parts, and one line tells how far the whole is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from rich.console import Console

from cmai_fast.evaluation import progress as progress_module
from cmai_fast.evaluation.parts import Parts
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.protocol import measure, stages
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.tasks.vqa import VQA
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 32 / 255)
SUITE = [AttackSpec("pgd", 2), AttackSpec("apgd", 2)]


def short_of_memory(subject, room):
    """The same model on a device that holds `room` samples."""
    subject = copy.copy(subject)
    subject.bridge = copy.copy(subject.bridge)
    encode = subject.bridge.encode_image

    def limited(pixel_values, **inputs):
        if len(pixel_values) > room:
            raise torch.OutOfMemoryError(f"tried to hold {len(pixel_values)}\nand much more text")
        return encode(pixel_values, **inputs)

    subject.bridge.encode_image = limited
    return subject


def test_what_does_not_fit_is_done_in_parts_to_the_same_results(subject, samples):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        whole = measure(subject, samples, THREAT, SUITE)
    with pytest.warns(RuntimeWarning, match=r"does not fit into memory.*6 samples at a time") as warned:
        parts = measure(short_of_memory(subject, 4), samples, THREAT, SUITE)
    assert len([w for w in warned if "memory" in str(w.message)]) == 1  # though it came to 3 samples

    def verdicts(measured):
        attacks = measured.record["attacks"]
        return {k: (a["attacked"], a["broken"], a["acc_robust_8bit"]) for k, a in attacks.items()}

    assert verdicts(parts) == verdicts(whole)
    assert [a.predictions for a in parts.attacked.values()] == [a.predictions for a in whole.attacked.values()]


class OneWrong(VQA):
    """Every text is right but one."""

    def __init__(self, wrong):
        self.wrong = wrong

    def score(self, prediction, sample):
        return float(prediction != self.wrong)


def test_a_changed_token_is_no_proof(subject, samples):
    """An attack stops where a token changes; if the text is still right by the task, it goes on."""
    spec, plain = AttackSpec("pgd", 10), Runner(subject, samples)
    rows = range(len(samples))
    stopped = plain.attack(spec, THREAT, rows)
    assert stopped.fooled.any()
    all_right = Runner(subject, samples, task=OneWrong("nothing"))
    went_on = all_right.attack(spec, THREAT, rows, keep=True)
    assert went_on.right.all() and went_on.passes.full_forward >= stopped.passes.full_forward + 10
    clean = all_right.images(rows)
    moved = [went_on.images[i] - clean[i] for i in rows]
    assert all(0 < m.abs().max() <= THREAT.eps + 1e-6 for m in moved), "also where the clean image was no match"
    assert AttackSpec("fgsm", 1).stops is AttackSpec("adaptive", 10).stops is False


def test_one_sample_that_does_not_fit_says_what_helps(subject, samples):
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"one sample alone .*\(tried to hold 1\); use a smaller dtype"),
        pytest.warns(RuntimeWarning),
    ):
        measure(short_of_memory(subject, 0), samples[:2], THREAT, SUITE)


def test_other_errors_are_not_taken_for_memory():
    def fail(rows):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(Parts(2).over([1, 2], fail))


@pytest.mark.parametrize("rows", [[], [3], list(range(7))])
def test_every_row_is_in_one_part(rows):
    parts = list(Parts(3).over(rows, lambda part: sum(part)))
    assert [row for part, _ in parts for row in part] == rows and all(total == sum(part) for part, total in parts)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_over_the_whole(clock):
    overall = Overall({"a": 10.0, "b": 30.0, "c": 60.0}, show=False)
    overall.start("a", 5)
    assert overall.seconds_left() is None
    clock[0] += 10
    overall.advance(5)
    assert overall.completed == 10 and overall.seconds_left() == pytest.approx(90)
    overall.start("c", 6)  # "b" was not needed
    clock[0] += 60
    overall.advance(6)
    assert overall.completed == 100 and overall.seconds_left() == 0


def test_what_an_earlier_process_did_is_no_pace_of_this_one(clock):
    overall = Overall({"a": 10.0, "b": 90.0}, show=False)
    overall.start("a", 5, done=5)
    overall.start("b", 9, done=3)
    assert overall.completed == 40 and overall.seconds_left() is None
    clock[0] += 7
    overall.advance(1)
    assert overall.completed == 50 and overall.seconds_left() == pytest.approx(35)


def test_one_line_tells_stage_and_time_left(clock):
    console = Console(record=True, width=120, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with Overall({"training": 50.0, "attack": 50.0}, console=console) as overall:
        overall.start("training", 10)
        clock[0] += 65
        overall.advance(10, "loss: clean 0.123")
        overall.start("attack", 4)
        overall._bar.refresh()
    text = console.export_text()
    assert "stage 2 of 2: attack" in text and "50%" in text and "about 1:05 left" in text and "clean 0.123" in text


def test_the_planned_stages_are_those_that_run(subject, samples):
    started = []

    class Recorded(Overall):
        def start(self, stage, total, done=0):
            started.append(stage)
            super().start(stage, total, done)

    planned = stages("undefended", 12, THREAT, SUITE, AttackSpec("pgd", 1), False)
    overall = Recorded(planned, show=False)
    measure(subject, samples[:4], THREAT, SUITE, curve=AttackSpec("pgd", 1), progress=overall)
    assert started == list(planned) and overall.completed == sum(planned.values())
