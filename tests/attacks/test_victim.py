from __future__ import annotations

import copy

import pytest
import torch

from cmai_fast.attacks import ATTACKS, Victim, exact_gradient, weighted
from cmai_fast.attacks.apgd import apgd
from cmai_fast.attacks.fgsm import fgsm
from cmai_fast.attacks.mi_fgsm import mi_fgsm
from cmai_fast.attacks.pgd import pgd
from cmai_fast.bridge import Bridge, bridge_of
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from unguarded import UNGUARDED


@pytest.fixture(scope="module")
def heads() -> ConsistencyHeads:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConsistencyHeads(64, 64, dim=8, hidden=16).double()


def score(victim, values, rows=None):
    return victim.score(victim.encode(values, rows), rows)


def test_loss_is_alpha_task_minus_beta_score(case64, heads):
    values = case64.space.to_model(case64.clean)
    victim = case64.victim(heads=heads)
    task, both, s_c = victim(values), victim(values, None, weighted(2.0, 0.7)), score(victim, values)
    assert s_c.shape == (6,) and torch.equal(task.right, both.right)
    torch.testing.assert_close(both.loss, 2.0 * task.loss - 0.7 * s_c)
    bridge = Bridge(case64.model)
    image = heads.project_image(bridge.encode_image(values))
    text = heads.project_text(bridge.encode_text(**case64.batch()))
    torch.testing.assert_close(s_c, torch.cosine_similarity(image, text))


def test_rows_choose_texts_and_scores(case64, heads):
    victim, loss = case64.victim(heads=heads), weighted(beta=1.0)
    values, rows = case64.space.to_model(case64.clean), torch.tensor([4, 1])
    whole, part = victim(values, None, loss), victim(values[rows], rows, loss)
    torch.testing.assert_close(part.loss, whole.loss[rows])
    torch.testing.assert_close(score(victim, values[rows], rows), score(victim, values)[rows])
    assert not torch.allclose(victim(values[rows], rows.flip(0), loss).loss, part.loss)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (0.0, 1.0), (0.5, 50.0)])
def test_gradient_is_that_of_the_loss_and_of_each_row_alone(alpha, beta, case64, heads):
    victim, loss = case64.victim(heads=heads), weighted(alpha, beta, balance="none")
    values = case64.space.to_model(case64.clean)
    grad, at = exact_gradient(victim, values, None, loss)
    assert not at.loss.requires_grad and not grad.requires_grad
    # Not smaller: RMSNorm computes in float32 whatever the model's dtype.
    h = 1e-4
    with torch.no_grad():
        slope = victim(values + h * grad.sign(), None, loss).loss - victim(values - h * grad.sign(), None, loss).loss
        slope = slope / (2 * h)
    torch.testing.assert_close(slope, grad.abs().flatten(1).sum(1), rtol=1e-2, atol=0)
    alone, _ = exact_gradient(victim, values[2:3], torch.tensor([2]), loss)
    torch.testing.assert_close(alone[0], grad[2], rtol=1e-6, atol=1e-9)


def test_beta_above_zero_lowers_the_score_and_below_zero_raises_it(case64, heads):
    scores, victim = {}, case64.victim(heads=heads)
    for beta in (-1.0, 1.0):
        loss = weighted(0.0, beta)
        adv = pgd(victim, case64.clean, ThreatModel("linf", 8 / 255), steps=5, early_stop=False, loss=loss).adv
        scores[beta] = score(victim, case64.space.to_model(adv))
    clean = score(victim, case64.space.to_model(case64.clean))
    assert (scores[1.0] < clean).all() and (clean < scores[-1.0]).all()


def test_an_incomplete_or_ragged_batch_is_refused(case64):
    batch = case64.batch()
    with pytest.raises(ValueError, match="no attention_mask, no labels"):
        Victim(Bridge(case64.model), case64.space, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"input_ids \(6, \d+\), .*labels \(5, \d+\); expected one shape"):
        Victim(Bridge(case64.model), case64.space, {**batch, "labels": batch["labels"][:5]})
    with pytest.raises(ValueError, match=r"beta is 0\.5, but there are no consistency heads"):
        pgd(case64.victim(), case64.clean, ThreatModel(), loss=weighted(beta=0.5))


def test_other_keys_of_a_collated_batch_are_ignored(case64):
    batch = {**case64.batch(), "pixel_values": torch.zeros(1), "sample_ids": torch.zeros(9)}
    assert len(Victim(Bridge(case64.model), case64.space, batch)) == 6


@pytest.mark.parametrize("name", UNGUARDED)
def test_bad_images_and_texts_are_named(name, case64):
    attack, threat, victim = ATTACKS[name], ThreatModel(), case64.victim()
    broken = case64.clean.clone()
    broken[3, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match="image 3 of the batch holds NaN"):
        attack(victim, broken, threat, steps=1)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]. Normalised pixel_values go through PixelSpace.to_pixels"):
        attack(victim, case64.space.to_model(case64.clean), threat, steps=1)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        attack(victim, (case64.clean * 255).to(torch.uint8), threat, steps=1)
    with pytest.raises(ValueError, match="there are 4 images for 6 texts"):
        attack(victim, case64.clean[:4], threat, steps=1)
    with pytest.raises(ValueError, match=r"reads \(N, 3, 64, 64\)"):
        attack(victim, case64.clean[:, :, :32], threat, steps=1)
    with pytest.raises(ValueError, match=r"expected \(N, 3, height, width\)"):
        attack(victim, case64.clean[:, :1], threat, steps=1)
    with pytest.raises(ValueError, match=r"sample_ids has shape \(2,\); expected \(6,\)"):
        attack(victim, case64.clean, threat, steps=1, sample_ids=torch.tensor([1, 2]))
    labels = case64.batch()["labels"]
    labels[4] = -100
    victim.batch["labels"] = labels
    with pytest.raises(ValueError, match="row 4 of labels holds only -100"):
        attack(victim, case64.clean, threat, steps=1)
    long = Victim(Bridge(case64.model), case64.space, case64.batch(extra=100))
    with pytest.raises(ValueError, match=r"the model's context is 128"):
        attack(long, case64.clean, threat, steps=1)


@pytest.mark.parametrize("name", UNGUARDED)
def test_an_empty_batch_gives_an_empty_result(name, case64):
    victim = Victim(Bridge(case64.model), case64.space, {k: v[:0] for k, v in case64.batch().items()})
    result = ATTACKS[name](victim, case64.clean[:0], ThreatModel(), steps=1)
    assert result.adv.shape == (0, 3, 64, 64) and result.fooled.shape == result.loss.shape == (0,)
    assert result.passes.full_forward == 0


def test_settings_that_mean_nothing_are_refused(case64):
    victim, threat = case64.victim(), ThreatModel()
    for attack, settings, said in (
        (pgd, {"steps": -1}, "steps is -1"),
        (pgd, {"restarts": 0}, "restarts is 0"),
        (pgd, {"step_size": -0.1}, "step_size is -0.1"),
        (pgd, {"step_size": float("nan")}, "step_size is nan"),
        (mi_fgsm, {"steps": -1}, "steps is -1"),
        (apgd, {"steps": 0}, "steps is 0"),
        (apgd, {"restarts": 0}, "restarts is 0"),
        (fgsm, {"steps": 2}, "Use pgd"),
        (fgsm, {"restarts": 2}, "Use pgd"),
    ):
        with pytest.raises(ValueError, match=said):
            attack(victim, case64.clean, threat, **settings)


def test_pixels_a_rounding_error_outside_the_box_come_back_inside(case64):
    result = pgd(case64.victim(), case64.clean * 0 + 1 + 5e-7, ThreatModel("linf", 0.0), steps=0)
    assert result.adv.max() <= 1


def test_half_precision_images_are_attacked_in_float32(case32):
    result = pgd(case32.victim(), case32.clean.bfloat16(), ThreatModel("linf", 8 / 255), steps=2, early_stop=False)
    delta = result.adv.double() - case32.clean.bfloat16().double()
    assert result.adv.dtype == torch.float32 and delta.abs().max() <= 8 / 255 + 1e-7


def test_gradients_in_float16_do_not_underflow(tiny_model, tiny_processor):
    """Of an answer that the model is sure of they are tiny, and float16 would lose most of them."""
    model, space = copy.deepcopy(tiny_model), PixelSpace.from_processor(tiny_processor)
    data = load_dataset("easyvqa", "train", 4, seed=3)
    batch = VQACollator(tiny_processor)([data[i] for i in range(4)])
    model.lm_head.weight.data *= 30  # sure of something
    bridge = Bridge(model)
    with torch.no_grad():
        logits, targets = bridge.fuse(bridge.encode_image(batch["pixel_values"]), **bridge.inputs(batch)[1])
    batch["labels"][batch["labels"] != -100] = logits.argmax(-1)[targets != -100]
    found = {}
    for dtype in (torch.float32, torch.float16):
        victim = Victim(bridge_of(model.to(dtype)), space, batch)
        with victim.attack_mode():
            leaf = victim.space.to_model(victim.pixels())
            found[dtype] = exact_gradient(victim, leaf)[0]
            if dtype == torch.float16:
                leaf.requires_grad_()
                (plain,) = torch.autograd.grad(victim(leaf).loss.sum(), leaf)
    exact, scaled = found[torch.float32], found[torch.float16]
    largest = exact.abs().flatten(1).amax(1)
    assert largest.min() < 1e-4 * largest.max()  # rows need scales of their own
    agree = [((g.sign() == exact.sign()) & (exact != 0)).flatten(1).float().mean(1).min() for g in (scaled, plain)]
    assert scaled.isfinite().all() and agree[0] > 0.9 and agree[1] < 0.5
    one, other = ((g.flatten(1) / largest[:, None]).double() for g in (scaled, exact))
    assert torch.cosine_similarity(one, other).min() > 0.99
    # A row's size goes with the exponential of its logits, and float16 rounds those.
    torch.testing.assert_close(one.abs().amax(1), torch.ones(4, dtype=torch.float64), rtol=0.25, atol=0)


def test_a_row_that_overflows_in_float16_is_scaled_less(tiny_model, tiny_processor, monkeypatch):
    model, space = copy.deepcopy(tiny_model).half(), PixelSpace.from_processor(tiny_processor)
    data = load_dataset("easyvqa", "train", 4, seed=3)
    victim = Victim(Bridge(model), space, VQACollator(tiny_processor)([data[i] for i in range(4)]))
    values = space.to_model(victim.pixels())
    expected, _ = exact_gradient(victim, values)
    differentiate, scales = torch.autograd.grad, []

    def overflowing(total, leaf, **kwargs):
        (grad,) = differentiate(total, leaf, **kwargs)
        scales.append(float(total.detach()))
        if len(scales) < 3:
            grad[1] = float("inf")
        return (grad,)

    monkeypatch.setattr(torch.autograd, "grad", overflowing)
    grad, _ = exact_gradient(victim, values)
    assert len(scales) == 3 and scales[0] > scales[1] > scales[2]
    torch.testing.assert_close(grad, expected, rtol=0.2, atol=1e-2 * float(expected.abs().max()))
