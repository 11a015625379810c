"""The sanity checks pass for an honest evaluation, and each planted flaw fails the check that is there for it."""

from __future__ import annotations

import copy

import pytest
import torch

from cmai_fast.attacks import ATTACKS, AttackResult, Passes
from cmai_fast.evaluation import sanity
from cmai_fast.evaluation.protocol import AttackSpec, measure
from cmai_fast.evaluation.sanity import sanity_checks
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 64 / 255)
SUITE = [AttackSpec("pgd", 8), AttackSpec("apgd", 16)]
FALLS, MORE, LARGE = (
    "robust accuracy falls with eps",
    "more steps never help the defender",
    "nothing survives eps 128/255",
)
NOISE, ROUNDED = "random noise is weaker than gradients", "8-bit images give the same verdict (within 2 points)"
TRANSFER, BATCH = "white-box attacks beat transferred ones", "results do not depend on the batch size"
BREAKS, FINITE = "the undefended model breaks", "gradients are finite"
CLEAR = torch.zeros(1000, dtype=torch.int64)


def check(subject, samples, measured=None, transferred=None, must_break=True):
    if measured is None:
        measured = measure(subject, samples, THREAT, SUITE, curve=AttackSpec("pgd", 4), transferred=transferred)
    checks = sanity_checks(subject, samples, measured, THREAT, must_break=must_break)
    assert all(c["detail"] for c in checks)
    return {c["check"]: c["passed"] for c in checks}


@pytest.fixture(scope="module")
def honest(subject, samples):
    return measure(subject, samples, THREAT, SUITE, curve=AttackSpec("pgd", 4))


def test_an_honest_evaluation_passes(subject, samples, honest):
    passed = check(subject, samples, honest)
    assert passed == dict.fromkeys((FALLS, MORE, LARGE, NOISE, ROUNDED, BATCH, BREAKS, FINITE), True)


def test_an_attack_that_does_nothing_is_exposed(subject, samples, monkeypatch):
    def nothing(objective, clean, threat, **_):
        return AttackResult(
            clean.clone(),
            torch.zeros(len(clean), dtype=torch.bool),
            torch.zeros(len(clean)),
            Passes(),
            CLEAR[: len(clean)],
        )

    for name in ("pgd", "apgd"):
        monkeypatch.setitem(ATTACKS, name, nothing)
    passed = check(subject, samples)
    assert not passed[BREAKS] and not passed[LARGE]


def test_masked_gradients_are_exposed(subject, samples, honest):
    """A defence that only hides its gradient: features are rounded, so that nothing flows back to the pixels."""
    masked = copy.copy(subject)
    masked.bridge = copy.copy(subject.bridge)
    encode = subject.bridge.encode_image
    masked.bridge.encode_image = lambda x: encode((x * 1e4).round() / 1e4)
    passed = check(masked, samples, transferred={"transfer": honest.attacked["pgd-8"].adv})
    assert not passed[TRANSFER] and not passed[LARGE]


def test_transferred_images_are_weaker_than_those_made_for_the_model(subject, samples, honest):
    noise = [(x + THREAT.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1) for x in honest.clean]
    assert check(subject, samples, transferred={"transfer": noise})[TRANSFER]


def test_randomness_that_depends_on_the_batch_is_exposed(subject, samples, monkeypatch):
    def careless(objective, clean, threat, **_):
        fooled = torch.arange(len(clean)) % 2 == 0  # by the place in the batch
        return AttackResult(clean.clone(), fooled, torch.zeros(len(clean)), Passes(), CLEAR[: len(clean)])

    monkeypatch.setitem(ATTACKS, "pgd", careless)
    assert not check(subject, samples[:9])[BATCH]


def test_a_curve_that_rises_is_exposed(subject, samples, honest):
    flawed = copy.deepcopy(honest)
    flawed.record["curve"][2]["acc_robust"] = flawed.record["curve"][1]["acc_robust"] + 0.05
    passed = check(subject, samples, flawed)
    assert not passed[FALLS] and passed[NOISE]


def test_more_steps_that_help_the_defender_are_exposed(subject, samples, honest):
    flawed = copy.deepcopy(honest)
    for entry in flawed.record["attacks"].values():
        entry["acc_robust"] += 0.3
    assert not check(subject, samples, flawed)[MORE]


def test_perturbations_that_rounding_removes_are_exposed(subject, samples, honest):
    flawed = copy.deepcopy(honest)
    flawed.record["acc_robust_8bit"] = flawed.record["acc_robust"] + 0.1
    assert not check(subject, samples, flawed)[ROUNDED]


def test_noise_that_beats_the_attack_is_exposed(subject, samples, honest):
    flawed = copy.deepcopy(honest)
    flawed.record["acc_robust"] = 1.01
    assert not check(subject, samples, flawed)[NOISE]


def test_gradients_that_are_not_numbers_are_exposed(subject, samples, honest):
    """The square root of zero: right going forward, infinite going back."""
    planted = copy.copy(subject)
    planted.bridge = copy.copy(subject.bridge)
    encode = subject.bridge.encode_image
    planted.bridge.encode_image = lambda x: encode(x + 0 * (x - x.detach()).abs().sqrt())
    measured = measure(planted, samples[:6], THREAT, [AttackSpec("pgd", 2)])
    assert measured.record["acc_clean"] == honest.record["acc_clean"]
    assert measured.record["attacks"]["pgd-2"]["nonfinite_gradients"] > 0
    assert check(subject, samples, honest)[FINITE] and not check(planted, samples[:6], measured)[FINITE]


def test_which_checks_are_made(subject, samples, honest, monkeypatch):
    assert BREAKS not in check(subject, samples, honest, must_break=False)
    bare = copy.deepcopy(honest)
    del bare.record["curve"]
    assert not {FALLS, MORE} & set(check(subject, samples, bare))
    few = []
    run = sanity.run_attack
    monkeypatch.setattr(sanity, "run_attack", lambda s, part, *a, **k: few.append(len(part)) or run(s, part, *a, **k))
    sanity_checks(subject, samples, honest, THREAT, must_break=True, limit=4)
    assert few and max(few) == 4
