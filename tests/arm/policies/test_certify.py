from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmai_fast.arm import Guard
from cmai_fast.arm.policies import Certify
from cmai_fast.arm.policies.policy import decide

FEW = {"n0": 10, "n": 40, "sigma": 0.05, "seed": 0}


def test_it_answers_what_the_smoothed_verifier_accepts(attacked, state):
    case = attacked.cases[0]
    easy, hard = replace(case, threshold=-100.0), replace(case, threshold=100.0)
    before = state(case.pipeline.model)
    first, second = decide(Certify(**FEW), [easy, hard])
    assert state(case.pipeline.model) == before
    assert first.answer == case.answer and first.route == "certify" and second is None
    certificate = first.details["certificate"]
    assert certificate["accepts"] is True and certificate["agreeing"] == certificate["n"] == 40
    assert certificate["radius"] == pytest.approx(0.05 * torch.special.ndtri(torch.tensor(0.001 ** (1 / 40))).item())
    assert decide(Certify(radius=certificate["radius"] + 1e-6, **FEW), [easy]) == [None]
    assert Certify(**FEW).certificate(hard).accepts is False


def test_what_is_smoothed_is_the_score_of_the_noised_picture_with_the_answer(attacked):
    case, pipeline = attacked.cases[1], attacked.cases[1].pipeline
    images = pipeline.images([case.answered])
    x, generator = images.split(images.pixels())[0], torch.Generator().manual_seed(1)
    draws = [x + 0.05 * torch.randn(n, *x.shape, generator=generator) for n in (10, 30, 10)]  # n0, then n in batches
    first, *rest = [pipeline.score([case.sample] * len(d), [case.answer] * len(d), list(d)) for d in draws]
    scores = torch.cat(rest)
    middle = replace(case, threshold=(scores.median() + 1e-4).item())
    found = Certify(n0=10, n=40, sigma=0.05, seed=1, batch_size=30).certificate(middle)
    accepts = int((scores >= middle.threshold).sum())
    assert found.agreeing == (accepts if int((first >= middle.threshold).sum()) > 5 else 40 - accepts)
    assert found.accepts is None and 15 < accepts < 25


def test_a_guard_adds_certificates_to_what_it_accepts(attacked):
    samples = [case.sample for case in attacked.cases[:2]]
    pipeline = attacked.cases[0].pipeline
    for decision in Guard(pipeline, threshold=-100.0, certify=Certify(**FEW)).decide_samples(samples):
        assert decision.route == "answer" and decision.details["certificate"]["accepts"] is True
    for decision in Guard(pipeline, threshold=100.0, certify=Certify(**FEW)).decide_samples(samples):
        assert decision.route == "reject" and decision.details == {}


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="certify: sigma is -1"):
        Certify(sigma=-1)
    with pytest.raises(ValueError, match="certify: radius is -1"):
        Certify(radius=-1)
