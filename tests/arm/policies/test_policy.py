"""The protocol of policies, and their settings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from cmai_fast.arm import Guard
from cmai_fast.arm.policies import POLICIES, Purify, Smooth, policy
from cmai_fast.arm.policies.policy import chain, check_settings, decide


@pytest.fixture
def registered():
    before = dict(POLICIES._things)
    yield
    POLICIES._things.clear()
    POLICIES._things.update(before)


def test_settings_are_read_from_text():
    smooth, ensemble = chain(
        ["smooth", "ensemble"],
        {"smooth.draws": "32", "smooth.sigma": "8/255", "smooth.seed": "none", "ensemble.models": "a, b/c",
         "ensemble.agree": "1"},
    )  # fmt: skip
    assert smooth == Smooth(draws=32, sigma=8 / 255, seed=None)
    assert (ensemble.models, ensemble.agree) == (("a", "b/c"), 1)
    assert chain(["purify"]) == [Purify()]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"smoth.draws": "3"}, "smoth.draws=3: expected POLICY.SETTING with one of the policies smooth, reject"),
        ({"draws": "3"}, "setting draws=3: expected POLICY.SETTING"),
        ({"smooth.drws": "3"}, r"smooth has no setting 'drws'; its settings are draws \(int, default 16\)"),
        ({"smooth.draws": "many"}, "smooth: draws is 'many'; its settings are"),
        ({"smooth.draws": "0"}, "smooth: draws is 0"),
        ({"reject.why": "x"}, "reject has no setting 'why'; it has no settings"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        chain(["smooth", "reject"], settings)


def test_names_are_checked_without_pytorch():
    code = (
        "import sys; from cmai_fast.arm.policies.policy import check_settings\n"
        "check_settings(['smooth', 'robust-weights'], {'smooth.draws': '3'})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ValueError, match="did you mean robust-weights"):
        check_settings(["robust_weights"], {})


def test_each_policy_gets_what_those_before_it_passed_on_in_one_call(attacked):
    asked = []

    class Takes:
        def __init__(self, name, count):
            self.name, self.count = name, count

        def decide_batch(self, cases):
            asked.append((self.name, [c.sample.id for c in cases]))
            return [c.decision("x", self.name) if i < self.count else None for i, c in enumerate(cases)]

    samples = [replace(case.sample, id=i) for i, case in enumerate(attacked.cases[:4])]
    guard = Guard(attacked.cases[0].pipeline, [Takes("a", 1), Takes("b", 2)], threshold=100.0)
    assert [d.route for d in guard.decide_samples(samples)] == ["a", "b", "b", "reject"]
    assert asked == [("a", [0, 1, 2, 3]), ("b", [1, 2, 3])]


def test_a_plugin_may_be_a_function_with_settings_or_a_class(registered, attacked):
    @policy("say", label="Say it")
    def say(case, *, words: str = "nothing", times: int = 1):
        return case.decision(" ".join([words] * times), "say")

    @policy("bound", label="Say its model")
    @dataclass(frozen=True)
    class Bound:
        mark: str = "!"

        def bind(self, pipeline):
            return lambda case: case.decision(pipeline.name + self.mark, "bound")

    case, pipeline = attacked.cases[0], attacked.cases[0].pipeline
    assert say(case, words="a").answer == "a", "the function itself is unchanged"
    (said,) = decide(chain(["say"], {"say.words": "yes", "say.times": "2"})[0], [case])
    assert said.answer == "yes yes" and decide(chain(["say"])[0], [case])[0].answer == "nothing"
    decision = Guard(pipeline, ["bound"], threshold=100.0).decide_samples([case.sample])[0]
    assert decision.answer == "easyvqa-llava!"


def test_a_policy_that_cannot_be_called_is_refused(registered, attacked):
    with pytest.raises(TypeError, match="policy 'bare' has settings without a default: words"):
        policy("bare", label="")(lambda case, *, words: None)
    with pytest.raises(TypeError, match="policy 'empty' is the class Empty; expected"):

        @policy("empty", label="")
        class Empty:
            pass

    class Wrong:
        def decide_batch(self, cases):
            return [None]

    for wrong in (Wrong(), lambda case: "red"):
        with pytest.raises(TypeError, match=r"for 2 cases; expected one Decision .*or None per case"):
            decide(wrong, attacked.cases[:2])


def test_a_chain_of_all_policies_decides_every_case(attacked, tmp_path):
    chained = chain(
        ["smooth", "purify", "certify", "robust-weights", "ensemble", "review"],
        {"smooth.draws": 3, "smooth.agreement": 1.0, "certify.n": 20, "certify.n0": 5,
         "robust-weights.robust": "easyvqa-llava-immune", "robust-weights.check": True,
         "ensemble.models": "easyvqa-llava-immune", "ensemble.agree": 1, "review.folder": str(tmp_path)},
    )  # fmt: skip
    guard = Guard(attacked.cases[0].pipeline, chained)
    decisions = guard.decide_samples([case.sample for case in attacked.cases])
    assert len(decisions) == len(attacked.cases) and all(json.loads(d.to_json()) for d in decisions)
    assert "answer" in {d.route for d in decisions} and len({d.route for d in decisions}) > 2
    plain = Guard(attacked.cases[0].pipeline).decide_samples([case.sample for case in attacked.cases])
    assert attacked.right(decisions) > attacked.right(plain)
