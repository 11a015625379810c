"""What is found for a sample does not depend on the samples beside it."""

from __future__ import annotations

import functools

import pytest
import torch

from cmai_fast.attacks import ATTACKS, AttackResult
from cmai_fast.attacks.apgd import apgd
from cmai_fast.attacks.pgd import pgd
from cmai_fast.threat import ThreatModel
from own_answers import Case

LINF, L2 = ThreatModel("linf", 1.5 / 255), ThreatModel("l2", 0.4)
RUNS = {
    "fgsm": functools.partial(ATTACKS["fgsm"]),
    "pgd": functools.partial(pgd, steps=5, restarts=2),
    "pgd, last iterate": functools.partial(pgd, steps=5, early_stop=False),
    "mi-fgsm": functools.partial(ATTACKS["mi-fgsm"], steps=5, restarts=2),
    "apgd": functools.partial(apgd, steps=6, restarts=2),
    "apgd, all steps": functools.partial(apgd, steps=6, early_stop=False),
}


def in_parts(attack, case: Case, threat: ThreatModel, parts: list[list[int]]) -> AttackResult:
    """The attack on each part by itself, padded by itself; rows of the result in the case's order."""
    results = [
        attack(case.victim(rows), case.clean[rows], threat, seed=7, sample_ids=case.sample_ids[rows]) for rows in parts
    ]
    back = torch.tensor([i for rows in parts for i in rows]).argsort()
    fields = ("adv", "fooled", "loss", "nonfinite", "zero_gradients")
    adv, fooled, loss, nonfinite, zero = (torch.cat([getattr(r, k) for r in results])[back] for k in fields)
    return AttackResult(adv, fooled, loss, results[0].passes, nonfinite, zero)


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("name", RUNS)
def test_float64_results_are_equal_in_any_batch(name, threat, case64):
    whole = in_parts(RUNS[name], case64, threat, [[0, 1, 2, 3, 4, 5]])
    assert whole.fooled.any() and not whole.fooled.all()
    for parts in ([[0], [1], [2], [3], [4], [5]], [[5, 1], [0, 3, 2, 4]]):
        split = in_parts(RUNS[name], case64, threat, parts)
        torch.testing.assert_close(split.adv - case64.clean, whole.adv - case64.clean, rtol=0, atol=1e-9)
        torch.testing.assert_close(split.loss, whole.loss, rtol=0, atol=1e-9)
        assert torch.equal(split.fooled, whole.fooled)


@pytest.mark.parametrize("name", RUNS)
def test_float32_verdicts_are_equal_in_any_batch(name, case32):
    whole = in_parts(RUNS[name], case32, LINF, [[0, 1, 2, 3, 4, 5]])
    assert whole.fooled.any() and not whole.fooled.all()
    for parts in ([[0], [1], [2], [3], [4], [5]], [[0, 1, 2, 3], [4, 5]], [[5, 3, 1], [0, 2, 4]]):
        assert torch.equal(in_parts(RUNS[name], case32, LINF, parts).fooled, whole.fooled)


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_starts_belong_to_sample_seed_and_restart(threat, case64):
    def start(ids: list[int], rows: list[int], **settings) -> torch.Tensor:
        result = pgd(
            case64.victim(rows), case64.clean[rows], threat, steps=0, early_stop=False,
            sample_ids=torch.tensor(ids), **settings,
        )  # fmt: skip
        return result.adv

    one, two = start([3, 9], [0, 0])
    assert (one - two).abs().max() > threat.eps / 100
    assert torch.equal(start([9, 3], [0, 0]), torch.stack([two, one]))  # the place in the batch is nothing
    assert torch.equal(start([3], [0])[0], one)
    assert not torch.equal(start([3], [0], seed=1)[0], one)
    assert threat.distance(start([3], [0]) - case64.clean[:1]) > threat.eps / 10


def test_restarts_have_starts_of_their_own(case64):
    """Two restarts of no steps: the result is the better of two points, and each is the better one for some sample."""
    ids = torch.arange(12)
    rows = [0] * 12
    victim = case64.victim(rows)
    one, two = (
        pgd(victim, case64.clean[rows], LINF, steps=0, restarts=n, early_stop=False, sample_ids=ids) for n in (1, 2)
    )
    changed = (one.adv != two.adv).flatten(1).any(1)
    assert changed.any() and not changed.all()
    assert (two.loss[changed] > one.loss[changed]).all()
