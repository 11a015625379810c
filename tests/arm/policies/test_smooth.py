from __future__ import annotations

from dataclasses import replace

import pytest

from cmai_fast.arm.policies import Smooth
from cmai_fast.arm.policies.policy import decide


@pytest.mark.parametrize("how", [{"change": "augment"}, {"change": "noise", "sigma": 32 / 255}])
def test_right_answers_are_brought_back(attacked, how):
    decisions = attacked.ask(Smooth(draws=8, agreement=0.5, seed=0, **how))
    assert attacked.brought_back(decisions) >= 4 and attacked.right(decisions) > attacked.own


@pytest.mark.parametrize("change", ["augment", "noise"])
def test_a_decision_does_not_depend_on_the_batch_and_repeats_with_its_seed(attacked, state, change):
    policy = Smooth(draws=3, change=change, agreement=0.1, seed=3)
    cases, before = attacked.cases[:3], state(attacked.cases[0].pipeline.model)
    together = decide(policy, cases)
    assert together == [decide(policy, [case])[0] for case in cases] == decide(policy, cases)
    assert state(cases[0].pipeline.model) == before
    assert all(sum(d.details["votes"].values()) == 3 for d in together)


def test_copies_of_all_cases_share_the_calls_of_the_model(attacked, monkeypatch):
    calls, pipeline = [], attacked.cases[0].pipeline
    plain = type(pipeline).generate
    monkeypatch.setattr(type(pipeline), "generate", lambda self, s, i=None: calls.append(len(s)) or plain(self, s, i))
    decide(Smooth(draws=4, batch_size=16, seed=0), attacked.cases[:5])
    assert calls == [16, 4]


def test_a_split_vote_is_passed_on(attacked, monkeypatch):
    case = attacked.cases[0]
    said = ["red", "Red.", "blue", "red"]
    monkeypatch.setattr("cmai_fast.arm.policies.smooth.answers", lambda *_: list(said))
    decision = decide(Smooth(draws=4, agreement=0.75), [replace(case, answer="RED")])[0]
    assert decision.answer == "RED" and decision.withheld_answer is None
    assert decision.details["votes"] == {"red": 3, "blue": 1}
    assert decide(Smooth(draws=4, agreement=0.8), [case]) == [None]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"draws": 0}, "draws is 0"),
        ({"sigma": 8.0}, "sigma is 8.0; .*pixels in"),
        ({"change": "zoom"}, "change is 'zoom'; expected noise or augment"),
        ({"agreement": 1.5}, "agreement is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"smooth: {message}"):
        Smooth(**settings)
