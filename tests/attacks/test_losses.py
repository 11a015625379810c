"""Losses against their formulas on plain forward passes, and each as an attack."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmai_fast.attacks import ATTACKS, LOSSES, Victim, exact_gradient, targeted, weighted
from cmai_fast.bridge import Bridge, bridge_of
from cmai_fast.bridge.output_layer import OutputLayer
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from families import FAMILIES

pgd, LINF = ATTACKS["pgd"], ThreatModel("linf", 8 / 255)


@pytest.fixture(scope="module")
def heads() -> ConsistencyHeads:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConsistencyHeads(64, 64, dim=8, hidden=16).double()


@pytest.fixture
def whole(tiny_model, tiny_processor):
    """A batch with its own pictures; float32, shared model."""
    data = load_dataset("easyvqa", "train", 4, seed=3)
    return Victim(
        Bridge(tiny_model), PixelSpace.from_processor(tiny_processor), VQACollator(tiny_processor)([*data])
    )  # fmt: skip


def log_probabilities(case):
    """Per sample: log-probabilities (tokens, vocabulary) of its response's places, and the tokens themselves."""
    found = []
    for i, (row, n) in enumerate(zip(case.rows, case.answers, strict=True)):
        values = case.space.to_model(case.clean[i : i + 1])
        with torch.no_grad():
            logits = case.model(input_ids=torch.tensor([row]), pixel_values=values).logits[0]
        found.append((F.log_softmax(logits[-n - 1 : -1], -1), row[-n:]))
    return found


def test_the_margin_is_that_of_the_token_that_leads_by_least(case64):
    expected = []
    for logp, tokens in log_probabilities(case64):
        leads = []
        for place, token in zip(logp, tokens, strict=True):
            others = torch.cat([place[:token], place[token + 1 :]])
            leads.append(place[token] - others.max())
        expected.append(-min(leads))
    victim, margin = case64.victim(), LOSSES["margin"]
    at = victim(case64.space.to_model(case64.clean), None, margin)
    torch.testing.assert_close(at.loss, torch.stack(expected), rtol=1e-6, atol=1e-8)
    assert (at.loss < 0).all() and at.right.all()
    result = pgd(victim, case64.clean, LINF, steps=5, loss=margin, early_stop=False)
    assert torch.equal(result.fooled, result.loss > 0) and result.fooled.any()
    assert result.passes.full_forward == 6  # the verdict comes from the same logits


def test_the_margin_is_the_same_where_the_output_layer_is_chunked(case64, monkeypatch):
    victim = case64.victim()
    values = case64.space.to_model(case64.clean)
    expected = victim(values, None, LOSSES["margin"])
    monkeypatch.setattr(OutputLayer, "_pays", lambda *_: True)
    chunked = case64.victim()
    found, plain = chunked(values, None, LOSSES["margin"]), chunked(values)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(plain.loss, victim(values).loss)
    assert torch.equal(found.right, plain.right)


def test_a_margin_over_one_answer_is_refused(case64):
    class One:
        logits, targets = torch.zeros(2, 1, 1), torch.zeros(2, 1, dtype=torch.int64)

    with pytest.raises(ValueError, match="there is only one to choose from"):
        LOSSES["margin"](torch.zeros(2, 1, 4), One(), case64.victim(), None)  # type: ignore[arg-type]


def test_consistency_of_either_sign(case64, heads):
    victim, values = case64.victim(heads=heads), case64.space.to_model(case64.clean)
    score = victim.score(victim.encode(values))
    for name, sign in (("lower-consistency", -1), ("raise-consistency", 1)):
        torch.testing.assert_close(victim(values, None, LOSSES[name]).loss, sign * score)
        result = pgd(victim, case64.clean, LINF, steps=3, loss=name, early_stop=False)
        after = victim.score(victim.encode(result.model_input))
        assert (sign * (after - score) > 0).all()
    with pytest.raises(ValueError, match="the loss uses S_c, but there are no consistency heads"):
        pgd(case64.victim(), case64.clean, LINF, steps=1, loss="raise-consistency")
    with pytest.raises(ValueError, match=r"beta is 0\.5, but there are no consistency heads"):
        pgd(case64.victim(), case64.clean, LINF, steps=1, loss=weighted(beta=0.5))


def test_the_feature_distance_grows_from_zero(whole, case64):
    clean = whole.pixels()
    at = whole(whole.space.to_model(clean), None, LOSSES["feature-distance"])
    assert (at.loss == 0).all()
    result = pgd(whole, clean, LINF, steps=3, loss="feature-distance", early_stop=False)
    with torch.no_grad():
        own, moved = (whole.encode(whole.space.to_model(x)) for x in (clean, result.adv))
    torch.testing.assert_close(result.loss, (moved - own).square().sum((1, 2)), rtol=1e-4, atol=1e-5)
    noise = pgd(whole, clean, LINF, steps=0, loss="feature-distance", early_stop=False)
    assert (result.loss > 2 * noise.loss).all()
    with pytest.raises(ValueError, match="the batch has no pixel_values"):
        pgd(case64.victim(), case64.clean, LINF, steps=1, loss="feature-distance")


def test_a_target_answer_gains_probability_row_by_row(case64):
    """Rows leave the batch at different steps; each keeps its own target."""
    wanted = case64.batch()
    for i, n in enumerate(case64.answers):
        wanted["labels"][i, -n:] = wanted["input_ids"][i, -n:] = 11 + i
    victim, values = case64.victim(), case64.space.to_model(case64.clean)
    loss = targeted({**wanted, "sample_ids": case64.sample_ids})
    before = victim(values, None, loss).loss
    assert torch.equal(before, -Victim(victim.bridge, victim.space, wanted)(values).loss)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(victim(values[rows], rows, loss).loss, before[rows])
    result = pgd(victim, case64.clean, LINF, steps=5, loss=loss, early_stop=False)
    assert (result.loss > before + 0.1).all()


def test_class_0_is_a_target_like_any_other():
    family = next(f for f in FAMILIES if f.name == "CLIP")
    batch = family.batch(family.model(), family.samples())
    victim = Victim(bridge_of(family.model()), PixelSpace.from_processor(family.processor), batch)
    loss = targeted({**batch, "labels": torch.zeros_like(batch["labels"])})
    clean = victim.pixels()
    result = pgd(victim, clean, LINF, steps=4, loss=loss, early_stop=False)
    before = victim(victim.space.to_model(clean), None, loss).loss
    assert (result.loss > before).all()


def test_each_output_is_computed_once(case64):
    victim, values = case64.victim(), case64.space.to_model(case64.clean)
    outputs = victim.outputs(victim.encode(values))
    assert outputs.logits is outputs.logits and len(outputs.targets) == 6
    assert victim.passes.full_forward == 1
    torch.testing.assert_close(outputs.losses, victim(values).loss)
    assert victim.passes.full_forward == 2 and outputs.right.all()


def test_a_loss_of_features_alone_is_differentiated_through_the_vision_side(case64, heads):
    victim, values = case64.victim(heads=heads), case64.space.to_model(case64.clean)
    grad, at = exact_gradient(victim, values, None, LOSSES["lower-consistency"])
    expected, _ = exact_gradient(victim, values, None, weighted(0.0, 1.0, balance="none"))
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-10)
    assert at.right.all() and (victim.passes.vision_backward, victim.passes.full_backward) == (1, 1)
