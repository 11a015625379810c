"""Standard sets of attacks: what is in them, on whom each attack runs, and that the batch size changes nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec, check_suite
from cmai_fast.evaluation.suites import SUITES, suite
from cmai_fast.report.words import attack_text
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 24 / 255)


def short(name: str, task: str = "vqa", steps: int = 4) -> list[AttackSpec]:
    return [spec if spec.name == "fgsm" else replace(spec, steps=steps) for spec in suite(name, task)]


def test_what_is_in_them():
    assert SUITES.names() == ["autoattack", "quick", "robustvlm", "standard"]
    for name in SUITES:
        check_suite(suite(name))
    keys = [spec.key for spec in suite("autoattack")]
    assert keys == ["apgd-100", *(f"apgd-100[loss=margin,other={k}]" for k in range(9)), "square-5000"]
    towards = [f"apgd-100[loss=margin,other={k}]" for k in range(9)]
    all_of_it = ["pgd-50x2", "apgd-100", "apgd-100[loss=margin]", *towards, "square-1000"]
    assert [s.key for s in suite("standard")] == all_of_it
    away = [f"apgd-100[first_step=1.0,reference={k}]" for k in range(5)]
    again, at = (
        "apgd-100[first_step=1.0,again=True]",
        [f"apgd-100[first_step=1.0,target={w}]" for w in ("maybe", "Word")],
    )
    assert [s.key for s in suite("robustvlm", "open-vqa")] == [*away, again, *at]
    assert [s.key for s in suite("robustvlm", "captioning")] == [*away, again]
    with pytest.raises(ValueError, match="unknown suite 'autoatack'; did you mean autoattack"):
        suite("autoatack")


def test_autoattack_tries_every_other_answer_on_what_still_stands(subject, samples):
    record = measure(subject, samples, THREAT, short("autoattack")).record
    assert set(record["left_out"]) == {f"apgd-4[loss=margin,other={k}]" for k in (7, 8)}  # there are seven others
    attacks = list(record["attacks"].values())
    assert [a.get("other") for a in attacks] == [None, 0, 1, 2, 3, 4, 5, 6, None]
    for before, after in itertools.pairwise(attacks):
        assert after["attacked"] <= before["attacked"] and after["acc_robust"] <= before["acc_robust"]
        assert after["attacked"] >= len(samples) * before["acc_robust"] - 1e-9
    assert record["acc_robust"] < record["acc_clean"] and attacks[0]["attacked"] == len(samples)
    open_ended = [replace(s, choices=()) if i == 2 else s for i, s in enumerate(samples)]
    with pytest.raises(ValueError, match=rf"sample {samples[2].id} has no choices, and apgd-4.* moves to one of them"):
        measure(subject, open_ended, THREAT, short("autoattack"))


def test_robustvlm_goes_on_from_the_worst_image(subject, samples, monkeypatch):
    """With the reference that gave it; attacks take all their steps, and references that nobody has are left out."""
    two = [replace(s, references=(s.answer, "a colour")) for s in samples]
    seen = {}
    attack = Runner.attack

    def watched(self, spec, threat, rows, *, starts=None, **how):
        found = attack(self, spec, threat, rows, starts=starts, **how)
        seen[spec.key] = found, dict(starts.items()) if starts is not None else None
        return found

    monkeypatch.setattr(Runner, "attack", watched)
    record = measure(subject, two, ThreatModel("linf", 8 / 255), short("robustvlm")).record
    assert set(record["left_out"]) == {f"apgd-4[first_step=1.0,reference={k}]" for k in (2, 3, 4)}
    first, again = (seen[f"apgd-4[first_step=1.0,{aim}]"] for aim in ("reference=0", "again=True"))
    assert (first[0].forwards == 6).all() and not first[0].fooled.any()  # the clean image, the start, four steps
    assert again[1].keys() == set(range(12)) and {reference for _, reference in again[1].values()} <= {0, 1}
    assert again[0].rows and all(again[1][row][1] == 0 for row in again[0].rows)  # nothing got worse than the first
    assert [a["attacked"] for a in record["attacks"].values()][-2:] == [
        len(again[0].rows) - int((~again[0].right).sum())
    ] * 2
    assert {a.get("target") for a in record["attacks"].values()} == {None, "maybe", "Word"}


@pytest.mark.parametrize("name", ["autoattack", "robustvlm"])
def test_verdicts_do_not_depend_on_the_batch_size(name, subject, samples):
    """RobustVLM's own program runs at batch size 1."""
    plan = [spec for spec in short(name, steps=3) if spec.other in (None, 0) and spec.reference in (None, 0)]
    one, whole = (measure(subject, samples[:4], THREAT, plan, batch_size=n) for n in (1, 4))
    for key, attacked in whole.attacked.items():
        assert one.attacked[key].predictions == attacked.predictions and one.attacked[key].rows == attacked.rows
        assert (one.attacked[key].forwards == attacked.forwards).all()
    assert one.record["acc_robust"] == whole.record["acc_robust"]


def test_a_report_says_what_each_attack_aims_at():
    said = [
        attack_text(s.key, {**s.to_dict(), "label": s.label})
        for s in (*suite("autoattack")[:2], *suite("robustvlm")[4:7])
    ]
    assert said == [
        "APGD-100", "APGD-100 [margin, other 1]", "APGD-100 [reference 5]", "APGD-100 [from the worst image]",
        "APGD-100 [target 'maybe']",
    ]  # fmt: skip


def test_a_first_step_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"apgd: first_step is 0\.0; expected a finite number above 0, in radii"):
        AttackSpec("apgd", settings={"first_step": "0"})
