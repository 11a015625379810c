"""ProEAT: tokens behind a question that stays, and the image, against what the model answers to both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from fitted import colours, fitted
from typed_prompts import losses, snapshot, tokens, victim

STILL, LINF = ThreatModel("linf", 0.0), ThreatModel("linf", 4 / 255)


@pytest.fixture(scope="module")
def pipeline(make_tiny) -> Pipeline:
    return fitted(make_tiny)


def run(pipeline, threat, **settings):
    made = victim(pipeline, colours()[:4], exact=False)
    before = snapshot(pipeline.model), made.batch
    result = ATTACKS["proeat"](made, made.pixels(), threat, **{"steps": 4, "tokens": 5, "candidates": 8, **settings})
    assert (snapshot(pipeline.model), made.batch) == before
    return made.pixels(), result


def test_the_question_stays_and_exactly_so_many_tokens_follow(pipeline):
    clean, result = run(pipeline, LINF)
    samples = colours()[:4]
    typed = [replace(s, prompt=p) for s, p in zip(samples, result.prompts, strict=True)]
    for sample, prompt, old, new in zip(
        samples, result.prompts, tokens(pipeline, samples), tokens(pipeline, typed), strict=True
    ):
        assert prompt.startswith(sample.prompt + " ") and len(new) == len(old) + 5
    assert (result.adv - clean).abs().amax() <= 4 / 255 + 1e-6 and not torch.equal(result.adv, clean)


def test_text_steps_find_more_and_the_image_adds_to_them(pipeline):
    samples = colours()[:4]
    found = [run(pipeline, threat, steps=steps)[1] for threat, steps in ((STILL, 1), (STILL, 6), (LINF, 6))]
    first, text, both = (r.loss.mean() for r in found)
    assert first < text < both
    for result in found[:2]:
        torch.testing.assert_close(result.loss, losses(pipeline, samples, result.prompts), rtol=1e-4, atol=1e-5)


def test_verdicts_are_those_of_the_typed_text_in_any_batch(pipeline):
    spec = AttackSpec("proeat", 2, settings={"tokens": 4, "candidates": 4})
    runs = [Runner(pipeline, colours(), batch_size=n).attack(spec, LINF, keep=True) for n in (12, 5)]
    assert runs[0].prompts == runs[1].prompts and runs[0].predictions == runs[1].predictions
    typed = [replace(colours()[row], prompt=p) for row, p in zip(runs[0].rows, runs[0].prompts, strict=True)]
    images = [runs[0].images[row] for row in runs[0].rows]
    assert pipeline.generate(typed, images) == runs[0].predictions
    assert not runs[0].right.all() and (runs[0].fooled == ~runs[0].right).all()


def test_restored_after_an_exception_and_refused(pipeline):
    made, calls = victim(pipeline, colours()[:2]), []
    before = snapshot(pipeline.model), made.batch

    def fail(*_):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")

    handle = pipeline.model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ATTACKS["proeat"](made, made.pixels(), ThreatModel("linf", 1e-4), steps=2, tokens=2, candidates=2)
    handle.remove()
    assert (snapshot(pipeline.model), made.batch) == before
    for key in ("tokens", "candidates", "top_k"):
        with pytest.raises(ValueError, match=f"proeat: {key} is 0; expected at least 1"):
            AttackSpec("proeat", settings={key: 0})
