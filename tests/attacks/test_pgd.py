from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cmai_fast.attacks import ATTACKS, Passes, weighted
from cmai_fast.attacks.fgsm import fgsm
from cmai_fast.attacks.mi_fgsm import mi_fgsm
from cmai_fast.attacks.pgd import pgd
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.threat import ThreatModel
from plain_attacks import look, plain_pgd, start_of
from recording import Recording
from unguarded import UNGUARDED

LINF, L2 = ThreatModel("linf", 1.5 / 255), ThreatModel("l2", 0.4)
BOTH = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


@BOTH
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_deltas_are_those_of_a_loop_by_hand(threat, precision, case32, case64):
    case, tolerance = (case64, 1e-12) if precision == "float64" else (case32, 1e-6)
    start = start_of(case, threat, seed=5)
    plain = plain_pgd(case, threat, start, 4, threat.eps / 3)[-1]
    result = pgd(
        case.victim(), case.clean, threat, steps=4, step_size=threat.eps / 3, seed=5, sample_ids=case.sample_ids,
        early_stop=False,
    )  # fmt: skip
    assert result.adv.dtype == case.clean.dtype
    torch.testing.assert_close(result.adv - case.clean, plain - case.clean, rtol=0, atol=tolerance)
    loss, right, _ = look(case, plain)
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.fooled, ~right)


@BOTH
def test_the_shrinking_batch_takes_the_steps_of_the_full_one(threat, case64):
    steps, size = 8, threat.eps / 4
    plain = plain_pgd(case64, threat, start_of(case64, threat, seed=0), steps, size)
    looks = [look(case64, x) for x in plain]
    victim, recording = case64.victim(), Recording()
    result = pgd(
        victim,
        case64.clean,
        threat,
        steps=steps,
        step_size=size,
        sample_ids=case64.sample_ids,
        early_stop=True,
        gradient=recording,
    )

    fooled_at = [next((k for k, (_, right, _) in enumerate(looks) if not right[i]), None) for i in range(6)]
    assert len({k for k in fooled_at if k is not None}) > 1 and None in fooled_at  # rows leave at different steps
    assert len(recording.asked) == steps
    for k, (rows, x) in enumerate(recording.asked):
        assert rows == [i for i, first in enumerate(fooled_at) if first is None or first >= k]
        torch.testing.assert_close(x, plain[k][rows], rtol=0, atol=1e-9)
    for i, first in enumerate(fooled_at):
        # Not fooled: the point of highest loss, which here is none but an iterate.
        k = int(torch.stack([loss[i] for loss, _, _ in looks]).argmax()) if first is None else first
        torch.testing.assert_close(result.adv[i], plain[k][i], rtol=0, atol=1e-9)
        assert bool(result.fooled[i]) == (first is not None)


@BOTH
def test_momentum_accumulates_l1_normalised_gradients(threat, case64):
    steps, size = 6, threat.eps / 6
    plain = plain_pgd(case64, threat, case64.clean, steps, size, decay=1.0)
    victim, recording = case64.victim(), Recording()
    pgd(
        victim,
        case64.clean,
        threat,
        steps=steps,
        step_size=size,
        decay=1.0,
        random_start=False,
        early_stop=False,
        gradient=recording,
    )
    for (_, x), expected in zip(recording.asked, plain, strict=False):
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)
    without = plain_pgd(case64, threat, case64.clean, steps, size)
    assert (plain[-1] - without[-1]).abs().max() > size / 100  # momentum that is only scaled would be this


def test_mi_fgsm_is_momentum_1_from_the_clean_image_in_steps_of_eps_over_k(case64):
    plain = plain_pgd(case64, LINF, case64.clean, 5, LINF.eps / 5, decay=1.0)
    result = mi_fgsm(case64.victim(), case64.clean, LINF, steps=5)
    kept = ~result.fooled
    assert kept.any()
    torch.testing.assert_close(result.adv[kept], plain[-1][kept], rtol=0, atol=1e-9)


def test_fgsm_is_one_step_of_eps_from_the_clean_image(case64):
    expected = (case64.clean + LINF.eps * look(case64, case64.clean)[2].sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(case64.victim(), case64.clean, LINF).adv, expected, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("name", UNGUARDED)
def test_loss_and_verdict_are_those_of_the_images_returned(name, threat, case64):
    own = {"steps": 1 if name == "fgsm" else 5}
    if ATTACKS[name].queries:
        own = {"steps": 200, "loss": "cross-entropy"}  # which is not its default
    result = ATTACKS[name](case64.victim(), case64.clean, threat, **own)
    loss, right, _ = look(case64, result.adv)
    torch.testing.assert_close(result.loss, loss, rtol=1e-9, atol=1e-9)
    assert torch.equal(result.fooled, ~right)
    assert (result.loss > look(case64, case64.clean)[0]).all()


@pytest.mark.parametrize("name", UNGUARDED)
def test_a_sample_that_is_wrong_untouched_is_fooled_by_its_clean_image(name, case64):
    case = type(case64)(**{**vars(case64), "rows": [list(r) for r in case64.rows]})
    case.rows[2][-1] = 8 if case.rows[2][-1] == 7 else 7
    result = ATTACKS[name](case.victim(), case.clean, LINF, steps=50 if ATTACKS[name].queries else 1)
    assert result.fooled[2] and torch.equal(result.adv[2], case.clean[2])
    assert not torch.equal(result.adv[0], case.clean[0])


def test_restarts_only_help_and_later_ones_run_what_is_left(case64):
    threat = ThreatModel("linf", 0.8 / 255)
    one, three = (
        pgd(case64.victim(), case64.clean, threat, steps=2, step_size=threat.eps / 8, restarts=n) for n in (1, 3)
    )
    assert (three.fooled >= one.fooled).all()
    left = ~one.fooled
    assert (three.loss[left] >= one.loss[left]).all() and (three.loss[left] > one.loss[left]).any()
    assert torch.equal(three.adv[one.fooled], one.adv[one.fooled])


def test_without_early_stop_the_best_restart_counts(case64):
    runs = [
        pgd(case64.victim(), case64.clean, LINF, steps=1, step_size=1e-5, restarts=n, early_stop=False)
        for n in (1, 2, 3)
    ]
    for fewer, more in itertools.pairwise(runs):
        assert (more.fooled >= fewer.fooled).all()
        same = more.fooled == fewer.fooled
        assert (more.loss[same] >= fewer.loss[same]).all()


def test_default_step_crosses_the_ball_and_falls_linearly_to_a_fine_one(case64):
    for steps in (1, 4, 10):
        victim, recording = case64.victim(), Recording()
        last = pgd(
            victim, case64.clean * 0 + 0.5, LINF, steps=steps, random_start=False, early_stop=False, gradient=recording
        ).adv
        points = [*(images for _, images in recording.asked), last]
        moves = [(b - a).abs().max().item() for a, b in itertools.pairwise(points)]
        assert moves[0] == pytest.approx(LINF.eps)  # 2 eps, cut at the ball
        # No pixel moves further than the step, and some pixel takes it whole once it is shorter than the ball is wide.
        for k, moved in enumerate(moves):
            size = 2 * LINF.eps * (1 - k / steps)
            assert moved <= size * (1 + 1e-6)
        assert steps < 4 or moves[-1] == pytest.approx(2 * LINF.eps / steps)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("name", UNGUARDED)
def test_every_pass_is_on_the_bill(name, early_stop, case64, monkeypatch):
    """Counted from outside: forwards of the output layer and of the vision tower, calls of autograd."""
    ran = {"head": 0, "vision": 0, "backward": 0, "text": 0}
    inner, differentiate = case64.model.model, torch.autograd.grad

    def grad(*args, **kwargs):
        ran["backward"] += 1
        return differentiate(*args, **kwargs)

    def count(what):
        return lambda *_: ran.__setitem__(what, ran[what] + 1)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    hooks = [
        module.register_forward_hook(count(what))
        for what, module in (
            ("head", case64.model.lm_head),
            ("vision", inner.vision_tower),
            ("text", inner.language_model),
        )
    ]
    with torch.random.fork_rng():
        heads = ConsistencyHeads(64, 64, dim=4, hidden=4)
    victim = case64.victim(heads=heads)
    victim.passes = Passes(full_forward=100)
    try:
        settings: dict[str, Any] = {"steps": 1} if name == "fgsm" else {"steps": 6, "restarts": 2}
        settings["loss"] = weighted(beta=0.1)
        if name in ("pgd", "apgd"):
            settings["early_stop"] = early_stop
        passes = ATTACKS[name](victim, case64.clean, LINF, **settings).passes
    finally:
        for hook in hooks:
            hook.remove()
    assert passes.full_forward == ran["head"] == ran["vision"]
    # One pass in three calls: the language side for p, the heads for q, and the vision side for both.
    assert 3 * passes.full_backward == ran["backward"]
    assert passes.text_forward == ran["text"] - ran["head"] == 1
    assert passes.vision_forward == passes.vision_backward == 0
    assert victim.passes == passes + Passes(full_forward=100)
    if name == "pgd" and not early_stop:
        assert (passes.full_forward, passes.full_backward) == (2 * 7, 2 * 6)


def test_what_is_fooled_costs_no_more_passes(case64):
    result = pgd(case64.victim(), case64.clean, ThreatModel("linf", 1.0), steps=20, restarts=5)
    assert result.fooled.all() and result.passes.full_backward < 20
