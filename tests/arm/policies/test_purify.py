from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmai_fast.arm.policies import Purify
from cmai_fast.arm.policies.policy import decide
from cmai_fast.attacks import Victim


@pytest.mark.parametrize("method, least", [("counter", 6), ("blur", 3), ("jpeg", 3), ("resize", 3)])
def test_right_answers_are_brought_back(attacked, method, least):
    decisions = attacked.ask(Purify(method))
    assert attacked.brought_back(decisions) >= least
    tau = attacked.cases[0].threshold
    assert all(d.details["score"] >= tau and d.details["method"] == method for d in decisions if d is not None)


def test_anti_adversary_raises_the_confidence_in_the_own_answer_which_helps_nobody(attacked):
    """It keeps the answer of an attacked model: measured in its docstring."""
    policy, cases = Purify("anti-adversary"), attacked.cases
    pipeline = cases[0].pipeline
    victim = Victim(pipeline.bridge, pipeline.space, pipeline.collate([c.answered for c in cases]))
    with torch.no_grad():
        before = victim(pipeline.space.to_model(victim.pixels())).loss
        after = victim(pipeline.space.to_model(victim.join(policy._purified(cases)))).loss
    assert after.mean() < 0.8 * before.mean() and (after < before).sum() >= 20
    assert (victim.join(policy._purified(cases)) - victim.pixels()).abs().max() <= 8 / 255 + 1e-6
    assert attacked.brought_back(attacked.ask(policy)) <= 1


@pytest.mark.parametrize("method", ["counter", "anti-adversary", "jpeg"])
def test_a_decision_does_not_depend_on_the_batch_and_the_model_is_restored(attacked, state, method):
    policy, cases = Purify(method, steps=2), attacked.cases[:4]
    before = state(cases[0].pipeline.model)
    together = decide(policy, cases)
    alone = [decide(policy, [case])[0] for case in cases]
    assert state(cases[0].pipeline.model) == before
    for a, b in zip(together, alone, strict=True):
        assert (a is None) == (b is None) and (a is None or a.answer == b.answer)


def test_an_answer_that_is_still_inconsistent_is_passed_on(attacked):
    cases = [replace(case, threshold=100.0) for case in attacked.cases[:2]]
    assert decide(Purify("blur"), cases) == [None, None]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "pray"}, "method is 'pray'; expected one of blur, jpeg"),
        ({"eps": 8}, "eps is 8; expected a number above 0 and up to 1"),
        ({"quality": 100}, "quality is 100"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"purify: {message}"):
        Purify(**settings)
