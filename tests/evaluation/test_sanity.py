"""The sanity checks pass for an honest evaluation, and each planted flaw fails the check that is there for it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.evaluation import sanity
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.sanity import sanity_checks
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.threat import ThreatModel
from planted import planted

THREAT = ThreatModel("linf", 64 / 255)
SUITE = [AttackSpec("pgd", 8), AttackSpec("apgd", 16)]
FALLS, MORE, LARGE = (
    "robust accuracy falls with eps",
    "more steps never help the defender",
    "nothing survives eps 128/255",
)
NOISE, ROUNDED = "random noise is weaker than gradients", "8-bit images give the same verdict (within 2 points)"
TRANSFER, BATCH = "white-box attacks beat transferred ones", "results do not depend on the batch size"
BREAKS, FINITE, THERE = "the undefended model breaks", "gradients are finite", "gradients are not zero"
SAME = "the same image gives the same features"


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    monkeypatch.setattr(sanity, "_LARGE", (AttackSpec("pgd", 10), AttackSpec("apgd", 10)))


def check(subject=None, samples=None, measured=None, transferred=None, must_break=True):
    if measured is None:
        measured = measure(subject, samples, THREAT, SUITE, curve=AttackSpec("pgd", 4), transferred=transferred)
    checks = sanity_checks(measured, THREAT, must_break=must_break)
    assert all(c["detail"] for c in checks)
    return {c["check"]: c["passed"] for c in checks}


@pytest.fixture(scope="module")
def honest(subject, samples):
    return measure(subject, samples, THREAT, SUITE, curve=AttackSpec("pgd", 4))


def test_an_honest_evaluation_passes(subject, samples, honest):
    passed = check(measured=honest)
    assert passed == dict.fromkeys((FALLS, MORE, LARGE, NOISE, ROUNDED, BATCH, BREAKS, FINITE, THERE, SAME), True)


def test_an_attack_that_does_nothing_is_exposed(subject, samples, monkeypatch):
    for name in ("pgd", "apgd"):
        planted(monkeypatch, name, {})
    passed = check(subject, samples)
    assert not passed[BREAKS] and not passed[LARGE]


@pytest.fixture(scope="module")
def masked(subject):
    """A defence that only hides its gradient: its input is rounded, so that nothing flows back to the pixels."""
    masked = copy.copy(subject)
    masked.bridge = copy.copy(subject.bridge)
    encode = subject.bridge.encode_image
    masked.bridge.encode_image = lambda x, **k: encode((x * 8).round() / 8, **k)
    return masked


def test_masked_gradients_are_exposed(masked, samples, honest):
    with pytest.warns(RuntimeWarning, match=r"pgd-8 met gradients that were exactly 0 on \d+ of \d+ samples"):
        measured = measure(
            masked, samples, THREAT, SUITE, transferred={"transfer": honest.attacked["pgd-8"].images}
        )  # fmt: skip
    assert measured.record["attacks"]["apgd-16"]["zero_gradients"] > 16
    with pytest.warns(RuntimeWarning, match="exactly 0"):
        passed = check(measured=measured)
    assert not passed[TRANSFER] and not passed[LARGE] and not passed[THERE]


def test_a_gradient_that_vanishes_now_and_then_is_no_fault(honest, samples):
    rare = copy.copy(honest)
    rare.attacked = {k: copy.copy(a) for k, a in honest.attacked.items()}
    for key, attacked in rare.attacked.items():
        attacked.right = attacked.right | True  # all stand
        attacked.zero_gradients = attacked.zero_gradients * 0 + (1 if key.startswith("apgd") else 0)  # of 16
    assert sanity._gradients_exist(rare)["passed"]
    rare.attacked["pgd-8"].zero_gradients[3] = 1  # of 8
    found = sanity._gradients_exist(rare)
    assert not found["passed"] and found["detail"].startswith("1 of 12 ")


def test_transferred_images_are_weaker_than_those_made_for_the_model(subject, samples, honest):
    own = honest.runner.images(range(len(samples)))
    noise = {i: (x + THREAT.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1) for i, x in enumerate(own)}
    assert check(subject, samples, transferred={"transfer": noise})[TRANSFER]


def test_randomness_that_depends_on_the_batch_is_exposed(subject, samples, honest, monkeypatch):
    def careless(victim, clean, threat, *, sample_ids, **_):
        first = ATTACKS["fgsm"](victim, clean, ThreatModel("linf", 1.0))
        moved = torch.arange(len(clean)) % 2 == 0  # by the place in the batch
        first.adv = torch.where(moved.view(-1, 1, 1, 1), 1 - clean, clean)
        return first

    monkeypatch.setitem(ATTACKS._things, "pgd", replace(ATTACKS["pgd"], run=careless))
    assert not check(measured=measure(subject, samples[:9], THREAT, [AttackSpec("apgd", 2)]))[BATCH]


def test_a_curve_that_rises_is_exposed(subject, samples, honest):
    flawed = replace(honest, record=copy.deepcopy(honest.record))
    flawed.record["curve"][2]["acc_robust"] = flawed.record["curve"][1]["acc_robust"] + 0.05
    passed = check(measured=flawed)
    assert not passed[FALLS] and passed[NOISE]


def test_more_steps_that_help_the_defender_are_exposed(subject, samples, honest):
    flawed = replace(honest, record=copy.deepcopy(honest.record))
    for entry in flawed.record["attacks"].values():
        entry["acc_robust"] += 0.3
    assert not check(measured=flawed)[MORE]


def test_perturbations_that_rounding_removes_are_exposed(subject, samples, honest):
    flawed = replace(honest, record=copy.deepcopy(honest.record))
    flawed.record["acc_robust_8bit"] = flawed.record["acc_robust"] + 0.1
    assert not check(measured=flawed)[ROUNDED]


def test_noise_that_beats_the_attack_is_exposed(subject, samples, honest):
    flawed = replace(honest, record=copy.deepcopy(honest.record))
    flawed.record["acc_robust"] = 1.01
    assert not check(measured=flawed)[NOISE]


def test_gradients_that_are_not_numbers_are_exposed(subject, samples, honest):
    """The square root of zero: right going forward, infinite going back."""
    broken = copy.copy(subject)
    broken.bridge = copy.copy(subject.bridge)
    encode = subject.bridge.encode_image
    broken.bridge.encode_image = lambda x, **k: encode(x + 0 * (x - x.detach()).abs().sqrt(), **k)
    measured = measure(broken, samples[:6], THREAT, [AttackSpec("pgd", 2)])
    assert measured.record["acc_clean"] == honest.record["acc_clean"]
    assert measured.record["attacks"]["pgd-2"]["nonfinite_gradients"] > 0
    assert check(measured=honest)[FINITE] and not check(measured=measured)[FINITE]


def test_which_checks_are_made(subject, samples, honest, monkeypatch):
    assert BREAKS not in check(measured=honest, must_break=False)
    bare = replace(honest, record=copy.deepcopy(honest.record))
    del bare.record["curve"]
    assert not {FALLS, MORE} & set(check(measured=bare))
    few = []
    run = Runner.attack
    monkeypatch.setattr(Runner, "attack", lambda s, x, t, rows, **k: few.append(len(rows)) or run(s, x, t, rows, **k))
    honest = measure(subject, samples, THREAT, [])
    sanity_checks(honest, THREAT, must_break=True, limit=4)
    assert few and max(few) == 4
