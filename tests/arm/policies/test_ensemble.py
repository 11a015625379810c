from __future__ import annotations

import pytest

from cmai_fast.arm.policies import Ensemble
from cmai_fast.arm.policies.policy import decide

IMMUNE = "easyvqa-llava-immune"


class Says:
    """A model that says this."""

    name, chooses = "says", False

    def __init__(self, *answers):
        self.answers = answers

    def generate(self, samples):
        return list(self.answers)


def test_a_model_that_the_attack_does_not_know_answers_rightly(attacked):
    decisions = attacked.ask(Ensemble((IMMUNE,), agree=1))
    assert attacked.right(decisions) >= max(attacked.own + 8, 22)


def test_the_attacked_model_and_another_pass_on_what_they_disagree_about(attacked):
    own = attacked.cases[0].pipeline
    decisions = attacked.ask(Ensemble((own, IMMUNE), agree=2))
    answered = [d for d in decisions if d is not None]
    assert attacked.right(decisions) >= len(answered) - 1, "hardly a wrong answer"
    assert len(answered) < len(decisions)


def test_votes_are_counted_as_answers_are_compared(attacked, monkeypatch):
    import cmai_fast.arm.policies.ensemble as module

    monkeypatch.setattr(module, "_loaded", lambda name, pipeline: Says(*name))
    models = (("red", "yes"), ("Red.", "no"), ("blue", "maybe"))
    bound = Ensemble(models, agree=2).bind(attacked.cases[0].pipeline)
    first, second = decide(bound, attacked.cases[:2])
    assert first.answer == "red" and first.details["votes"] == {"red": 2, "blue": 1} and second is None
    tied = Ensemble((("red",), ("blue",)), agree=1).bind(attacked.cases[0].pipeline)
    assert decide(tied, attacked.cases[:1]) == [None], "a tie is no agreement"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, r"models is \(\)"),
        ({"models": "easyvqa-llava"}, "models is 'easyvqa-llava'; expected several"),
        ({"models": ("a", "b"), "agree": 3}, "agree is 3 for 2 models; expected 1 to 2"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"ensemble: {message}"):
        Ensemble(**settings)


def test_an_unknown_model_is_named_when_the_guard_is_made(bundled):
    with pytest.raises(ValueError, match="unknown model 'nowhere'"):
        Ensemble(("nowhere",), agree=1).bind(bundled)
