"""What an attack of a suite aims at: a given text, another answer by rank, one of several references, and again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.data import Sample
from cmai_fast.evaluation.goals import goal
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 64 / 255)
TOWARDS_RED = AttackSpec("apgd", 12, target="red")


@pytest.fixture(scope="module")
def runner(subject, samples):
    return Runner(subject, samples)


def test_a_target_is_reached_beside_what_breaks(subject, samples):
    record = measure(subject, samples, THREAT, [TOWARDS_RED]).record["attacks"][TOWARDS_RED.key]
    assert TOWARDS_RED.key == "apgd-12[target=red]" and record["target"] == "red"
    red = sum(s.answer == "red" for s in samples)
    assert red == 2 and record["attacked"] == len(samples) - red  # whoever says red already is not attacked
    assert 0 < record["reached"] <= record["broken"] and record["asr_target"] == record["reached"] / record["attacked"]
    assert 1 <= record["per_sample"]["forward"] <= 14 and 0 < record["per_sample"]["backward"] <= 13


def test_the_fast_verdict_is_that_of_the_generated_text(runner):
    attacked = runner.attack(TOWARDS_RED, THREAT)
    assert attacked.fooled.tolist() == [p == "red" for p in attacked.predictions]
    assert (attacked.forwards[attacked.fooled] <= 14).all() and (attacked.forwards[~attacked.fooled] == 14).all()
    assert (attacked.backwards < attacked.forwards).all()


def test_results_of_a_target_do_not_depend_on_the_batch(runner):
    one, two = (runner.resized(size).attack(TOWARDS_RED, THREAT, stage=f"of {size}") for size in (12, 5))
    assert one.predictions == two.predictions and (one.forwards == two.forwards).all()


def test_an_attack_moves_to_the_likeliest_other_answers(runner, samples, monkeypatch):
    """By their rank at the clean image, as AutoAttack chooses its targets; any other answer that is given counts."""
    seen, own = [], ATTACKS["pgd"]
    watched = replace(own, run=lambda victim, *args, **how: seen.append(victim) or own.run(victim, *args, **how))
    monkeypatch.setitem(ATTACKS._things, "pgd", watched)
    for k in (0, 6, 7):
        attacked = runner.attack(AttackSpec("pgd", 1, settings={"loss": "margin"}, other=k), THREAT)
        assert len(attacked.rows) == (12 if k < 7 else 0)  # seven colours beside its own
    for victim, k in zip(seen, (0, 6), strict=True):
        others = victim.others
        with torch.no_grad():
            leads = others.leads(victim.outputs(victim.encode(victim.space.to_model(victim.pixels()))), None)
        rank = (leads > others.toward(leads, None)[:, None]).sum(1)
        assert rank.tolist() == [k] * 12 and others.counts.tolist() == [7] * 12


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_moving_to_every_other_answer_breaks_what_is_right(runner, loss):
    attacked = runner.attack(AttackSpec("apgd", 8, settings={"loss": loss}, other=0), THREAT)
    assert attacked.right.mean() < 0.5
    assert (attacked.fooled == ~attacked.right).all()


def test_dlr_names_the_sample_with_too_few_answers(subject, samples):
    few = [replace(s, choices=("red", "pink", s.answer)) if i == 3 else s for i, s in enumerate(samples)]
    spec = AttackSpec("pgd", 1, settings={"loss": "dlr"})
    with pytest.raises(ValueError, match=rf"sample {samples[3].id} has [23] answers to choose from, and the loss dlr"):
        Runner(subject, few).attack(spec, THREAT)
    with pytest.raises(ValueError, match=rf"sample {samples[0].id} has no wrong choices.*or use the loss margin"):
        Runner(subject, [replace(samples[0], choices=())]).attack(spec, THREAT)
    untouched = Runner(subject, samples).attack(spec, THREAT)
    assert len(untouched.rows) == 12


def test_references_are_taken_by_frequency():
    sample = Sample(1, (), "?", ("a cat", "dog", "Dog", "a dog", "dog.", "a  cat"))
    label = lambda k: goal(AttackSpec("pgd", reference=k), sample, "dog", None)  # noqa: E731
    assert [label(k) and label(k).answer for k in range(4)] == ["dog", "a cat", "a dog", None]
    assert goal(AttackSpec("pgd"), sample, "dog", None).answer == "dog", "not the first, which the model does not say"
    assert goal(AttackSpec("pgd", target="Dog"), sample, None, None) is None
    assert goal(AttackSpec("pgd", target="bird"), sample, None, None).references == ("bird",)


def test_an_attack_goes_on_from_an_image(runner, samples):
    """All steps are taken, from where it is told to, since the reference need not be what the model says."""
    start = runner.attack(AttackSpec("pgd", 1), ThreatModel("linf", 8 / 255), keep=True)
    spec = AttackSpec("apgd", 2, again=True)
    starts = {row: (start.images[row], 0) for row in (2, 5)}
    attacked = runner.attack(spec, THREAT, starts=starts)
    assert attacked.rows == [2, 5] and (attacked.forwards == 4).all() and not attacked.fooled.any()
    still = runner.attack(
        AttackSpec("pgd", 0, again=True, settings={"early_stop": False}), THREAT, starts=starts, keep=True
    )
    assert all(torch.equal(still.images[row], start.images[row]) for row in (2, 5))


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("pgd", {"target": " "}, "target is empty; expected the text that the model has to give"),
        ("pgd", {"target": "red", "reference": 1}, "pgd: target and reference are given; expected one of them"),
        (
            "pgd",
            {"other": 0},
            "pgd: other is 0, and the loss cross-entropy knows no other answers; set the loss to mar",
        ),
        ("adaptive", {"target": "red"}, "adaptive does not take target: it has no loss that would be aimed"),
    ],
)
def test_aims_that_mean_nothing_are_refused_without_a_model(name, changes, said):
    with pytest.raises(ValueError, match=said):
        AttackSpec(name, **changes)
