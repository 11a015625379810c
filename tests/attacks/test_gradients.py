"""Gradient estimators in every gradient attack, and the count of gradients that are zero."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cmai_fast.attacks import (
    ATTACKS,
    Exact,
    MeanOverTransforms,
    StaleBridge,
    Victim,
    exact_gradient,
    targeted,
    weighted,
)
from cmai_fast.attacks.gradients import Course
from cmai_fast.attacks.losses import LOSSES
from cmai_fast.bridge import bridge_of
from cmai_fast.mbat import maximise
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from families import FAMILIES

LINF = ThreatModel("linf", 1.5 / 255)
NAMES = [n for n, a in ATTACKS.items() if "gradient" in a.named and a.losses and not (a.text or a.fit)]


def shifted(pixels, noise):
    """A brightness and a pattern of its own for each draw."""
    return (pixels + 0.05 * noise + 0.1 * noise.flatten(1)[:, 0].view(-1, 1, 1, 1)).clamp(0, 1)


def settings(name):
    return {"steps": 1} if name == "fgsm" else {"steps": 4}


@pytest.mark.parametrize("name", NAMES)
def test_a_bridge_that_is_renewed_at_every_step_is_exact(name, case64):
    budget = settings(name)
    gradients = budget["steps"] + (name == "apgd")
    exact, bridge = (
        ATTACKS[name](case64.victim(), case64.clean, LINF, seed=3, gradient=g, **budget)
        for g in (Exact(), StaleBridge(gradients))
    )
    torch.testing.assert_close(bridge.adv, exact.adv, rtol=0, atol=1e-9)
    assert torch.equal(bridge.fooled, exact.fooled) and bridge.passes == exact.passes


@pytest.mark.parametrize("name", NAMES)
def test_a_stale_bridge_saves_backward_passes_of_the_whole_model_and_still_attacks(name, case64):
    victim, staleness = case64.victim(), []
    gradient = StaleBridge(0 if name == "fgsm" else 1, staleness=staleness)
    result = ATTACKS[name](victim, case64.clean, LINF, seed=3, gradient=gradient, **settings(name))
    before = victim(case64.space.to_model(case64.clean)).loss
    assert (result.loss > before).all()
    # One co-state at the clean image, one renewed on the way.
    assert result.passes.full_backward == (1 if name == "fgsm" else 2)
    assert result.passes.vision_backward == (1 if name == "fgsm" else 3 + (name == "apgd"))
    assert len(staleness) == (name != "fgsm")


def test_the_stale_step_of_a_shrinking_batch_uses_each_rows_own_co_state(case64):
    """p is kept for the whole batch: rows that have left must not shift the others."""
    victim, rows = case64.victim(), torch.tensor([4, 1])
    course = Course(victim, weighted(), case64.clean, case64.sample_ids, steps=2)
    values = case64.space.to_model(case64.clean)
    whole, _ = StaleBridge(0).start(course)(values, None, 0)
    part, at = StaleBridge(0).start(course)(values[rows], rows, 0)
    torch.testing.assert_close(part, whole[rows], rtol=1e-6, atol=1e-12)
    assert at is None
    renewed = StaleBridge(1).start(course)
    grad, _ = renewed(values[rows], rows, 1)
    torch.testing.assert_close(grad, exact_gradient(victim, values[rows], rows)[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("loss", ["margin", "targeted"])
def test_a_stale_bridge_takes_any_loss(loss, case64):
    named = LOSSES["margin"] if loss == "margin" else targeted(case64.batch())
    victim, values = case64.victim(), case64.space.to_model(case64.clean)
    course = Course(victim, named, case64.clean, case64.sample_ids, steps=1)
    grad, at = StaleBridge(1).start(course)(values, None, 0)
    expected, seen = exact_gradient(victim, values, None, named)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(at.loss, seen.loss)


def test_the_mean_over_transforms_is_that_of_its_draws(case64):
    """Against the gradient of each draw by itself, with the noise that the transform was given."""
    noises = []

    def watched(pixels, noise):
        noises.append(noise)
        return shifted(pixels, noise)

    victim, values = case64.victim(), case64.space.to_model(case64.clean)
    course = Course(victim, LOSSES["cross-entropy"], case64.clean, case64.sample_ids, steps=1, seed=5)
    grad, at = MeanOverTransforms(watched, draws=3).start(course)(values, None, 0)
    expected = torch.zeros_like(values)
    for noise in noises:
        leaf = case64.clean.clone().requires_grad_()
        loss = victim(case64.space.to_model(shifted(leaf, noise))).loss.sum()
        expected += torch.autograd.grad(loss, leaf)[0] * case64.space.std.double().view(3, 1, 1) / 3
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(at.loss, victim(values).loss)  # of the image itself
    assert len(noises) == 3 and not torch.equal(noises[0], noises[1])
    stacked = torch.stack(noises)
    assert stacked.abs().max() <= 1 and abs(stacked.mean()) < 0.01 and abs(stacked.var() - 1 / 3) < 0.01
    with pytest.raises(ValueError, match="draws is 0"):
        MeanOverTransforms(shifted, draws=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_transforms_does_not_depend_on_the_batch(name, case64):
    def run(rows, seed=7):
        return ATTACKS[name](
            case64.victim(rows), case64.clean[rows], LINF, seed=seed, sample_ids=case64.sample_ids[rows],
            gradient=MeanOverTransforms(shifted, draws=2), **({"steps": 1} if name == "fgsm" else {"steps": 2}),
        )  # fmt: skip

    whole, part = run([0, 1, 2, 3]), run([2, 0])
    torch.testing.assert_close(part.adv, whole.adv[[2, 0]], rtol=0, atol=1e-9)
    assert not torch.equal(run([0, 1], seed=8).adv, whole.adv[:2])
    before = case64.victim([0, 1, 2, 3])(case64.space.to_model(case64.clean[:4])).loss
    assert whole.loss.sum() > before.sum()


@pytest.fixture
def rounded(case64, monkeypatch):
    """A victim that rounds its input to 1/8, so that nothing flows back to the pixels."""
    victim = case64.victim()
    encode = victim.bridge.encode_image
    monkeypatch.setattr(victim.bridge, "encode_image", lambda x, **k: encode((x * 8).round() / 8, **k))
    return victim


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_are_all_zero_are_counted(name, rounded, case64):
    budget = settings(name)
    result = ATTACKS[name](rounded, case64.clean, LINF, **budget)
    standing = ~result.fooled
    assert standing.any() and (result.zero_gradients[standing] == budget["steps"]).all()
    assert (result.nonfinite == 0).all() and result.zero_gradients.dtype == torch.int64
    honest = ATTACKS[name](case64.victim(), case64.clean, LINF, **budget)
    assert (honest.zero_gradients == 0).all()


@pytest.mark.parametrize("solver", ["pgd", "bridge", "fgsm"])
def test_zero_gradients_are_counted_in_the_inner_problem(solver, rounded, case64):
    result = maximise(rounded, case64.clean, LINF, solver, steps=3, refreshes=1)
    assert result.zero_gradients.tolist() == [1 if solver == "fgsm" else 3] * 6
    honest = maximise(case64.victim(), case64.clean, LINF, solver, steps=3, refreshes=1)
    assert honest.zero_gradients.tolist() == [0] * 6
    torch.testing.assert_close(honest.model_input, case64.space.to_model(honest.adv), rtol=0, atol=1e-12)


def test_only_the_samples_without_a_gradient_are_counted_and_at_those_steps_only(case64):
    """One row is blind at the first step, another at all, a third has NaN, which is something else."""

    class Blind:
        def start(self, course):
            def estimate(model_input, rows, step):
                grad, at = exact_gradient(course.victim, model_input, rows, course.loss)
                grad[1] = 0
                if step == 0:
                    grad[4] = 0
                grad[2, 0, 0, 0] = float("nan")
                return grad, at

            return estimate

    for name in ("pgd", "apgd"):
        result = ATTACKS[name](case64.victim(), case64.clean, LINF, steps=3, gradient=Blind(), early_stop=False)
        assert result.zero_gradients.tolist() == [0, 3, 0, 0, 1, 0], name
        assert result.nonfinite.tolist() == [0, 0, 3, 0, 0, 0], name


def test_a_sample_without_an_image_lacks_no_gradient():
    family = next(f for f in FAMILIES if f.name == "Qwen2-VL")
    samples = family.samples()
    batch = family.batch(family.model(), [samples[0], dataclasses.replace(samples[1], pictures=()), samples[2]])
    victim = Victim(bridge_of(family.model()), PixelSpace.from_processor(family.processor), batch)
    result = ATTACKS["pgd"](victim, victim.pixels(), LINF, steps=2)
    assert result.zero_gradients.tolist() == [0, 0, 0]
