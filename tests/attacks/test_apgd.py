from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from cmai_fast.attacks import Evaluation, Passes
from cmai_fast.attacks.apgd import apgd, checkpoints
from cmai_fast.attacks.pgd import pgd
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from plain_attacks import look, plain_apgd, start_of
from recording import Recording


def reference(case, threat, steps, seed):
    """Per sample: the points evaluated (steps + 1, 3, H, W) and the checkpoints that halved the step."""
    start = start_of(case, threat, seed)
    found = []
    for i in range(len(case.clean)):

        def value_and_grad(x, i=i):
            loss, _, grad = look(case, x, [i])
            return loss.item(), grad

        points, halved = plain_apgd(value_and_grad, case.clean[i : i + 1], start[i : i + 1], threat, steps)
        found.append((torch.cat(points), halved))
    return found


@pytest.mark.parametrize("threat", [ThreatModel("linf", 16 / 255), ThreatModel("l2", 3.0)], ids=["linf 16/255", "l2 3"])
def test_trajectory_is_that_of_the_published_algorithm(threat, case64):
    steps, seed = 24, 3
    expected = reference(case64, threat, steps, seed)
    halvings = [tuple(halved) for _, halved in expected]
    assert len(set(halvings)) > 1 and max(map(len, halvings)) >= 2  # samples go their own ways
    victim, recording = case64.victim(), Recording()
    result = apgd(
        victim,
        case64.clean,
        threat,
        steps=steps,
        seed=seed,
        sample_ids=case64.sample_ids,
        early_stop=False,
        gradient=recording,
    )
    assert len(recording.asked) == steps + 1
    for k, (rows, x) in enumerate(recording.asked):
        assert rows == list(range(6))
        torch.testing.assert_close(x, torch.stack([points[k] for points, _ in expected]), rtol=0, atol=1e-9)
    assert result.fooled.any()


class Scripted:
    """Losses and gradients of each row written beforehand, whatever the image: every turn of the rules comes up."""

    words = None

    def __init__(self, rows: int, looks: int) -> None:
        generator = torch.Generator().manual_seed(0)
        up = torch.rand(looks, rows, generator=generator) < 0.8
        change = torch.where(up, 1.0, -4.0) * torch.rand(looks, rows, generator=generator)
        self.losses = change.double().cumsum(0).round(decimals=1)  # rounded, so that ties happen
        self.grads = torch.randn(looks, rows, 3, 1, 1, generator=generator, dtype=torch.float64)
        self.space, self.passes = PixelSpace([0.0] * 3, [1.0] * 3), Passes()
        self.attack_mode = self.counted = contextlib.nullcontext
        self.layout = self.origin = None
        self.asked: list[torch.Tensor] = []

    def __len__(self) -> int:
        return self.losses.shape[1]

    def start(self, course):
        def estimate(model_input, rows, step):
            assert step == len(self.asked)
            self.asked.append(model_input.clone())
            at = Evaluation(self.losses[step].clone(), torch.ones(len(self), dtype=torch.bool))
            return self.grads[step].clone(), at

        return estimate


def test_every_turn_of_the_halving_rules_is_the_published_one():
    rows, steps, threat = 150, 40, ThreatModel("linf", 0.25)
    victim, clean = Scripted(rows, steps + 1), torch.full((rows, 3, 1, 1), 0.5, dtype=torch.float64)
    apgd(victim, clean, threat, steps=steps, early_stop=False, gradient=victim)  # type: ignore[arg-type]
    counts = set()
    for i in range(rows):
        script = iter(zip(victim.losses[:, i].tolist(), victim.grads[:, i : i + 1], strict=True))
        value_and_grad = functools.partial(lambda script, _: next(script), script)
        points, halved = plain_apgd(value_and_grad, clean[:1], victim.asked[0][i : i + 1], threat, steps)
        torch.testing.assert_close(torch.stack(victim.asked)[:, i], torch.cat(points), rtol=0, atol=1e-12)
        counts.add(len(halved))
    assert len(counts) > 3


def test_the_shrinking_batch_takes_the_steps_of_the_full_one(case64):
    threat, steps = ThreatModel("linf", 1.5 / 255), 14
    expected = reference(case64, threat, steps, 0)
    right = torch.stack([look(case64, torch.stack([p[k] for p, _ in expected]))[1] for k in range(steps + 1)])
    assert right.all(0).any() and not right.all(0).all()
    victim, recording = case64.victim(), Recording()
    result = apgd(victim, case64.clean, threat, steps=steps, sample_ids=case64.sample_ids, gradient=recording)
    for k, (rows, x) in enumerate(recording.asked):
        assert rows == [i for i in range(6) if right[:k, i].all()]
        torch.testing.assert_close(x, torch.stack([expected[i][0][k] for i in rows]), rtol=0, atol=1e-9)
    assert torch.equal(result.fooled, ~right.all(0))


def test_checkpoints_are_the_published_ones():
    # p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 (Croce and Hein, 2020, section 3.2)
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(1000)) == [220, 410, 570, 700, 800, 870, 930, 990]
    assert sorted(checkpoints(10)) == [3, 5, 6, 7, 8, 9, 10]
    assert checkpoints(1) == {1}


def test_returns_the_best_point_of_the_trajectory(case64):
    threat, steps = ThreatModel("linf", 16 / 255), 8
    expected = reference(case64, threat, steps, 0)
    result = apgd(case64.victim(), case64.clean, threat, steps=steps, sample_ids=case64.sample_ids, early_stop=False)
    for i, (points, _) in enumerate(expected):
        looks = [look(case64, p[None], [i]) for p in points]
        ranked = [(not right[0], loss[0].item()) for loss, right, _ in looks]
        best = max(range(len(ranked)), key=ranked.__getitem__)
        torch.testing.assert_close(result.adv[i], points[best], rtol=0, atol=1e-9)


def test_finds_at_least_what_pgd_finds_on_average(case64):
    threat = ThreatModel("linf", 16 / 255)
    losses = [
        attack(case64.victim(), case64.clean, threat, steps=20, early_stop=False).loss.mean() for attack in (apgd, pgd)
    ]
    assert losses[0] > losses[1]
