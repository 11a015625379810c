"""Attacks on the words of a prompt: the ball, the gradient, the closed form, every family, and the solvers."""

from __future__ import annotations

import copy

import pytest
import torch

from cmai_fast.attacks import Victim
from cmai_fast.attacks.apgd import apgd
from cmai_fast.attacks.pgd import pgd
from cmai_fast.attacks.victim import Outputs
from cmai_fast.attacks.words import Words
from cmai_fast.bridge import bridge_of
from cmai_fast.bridge.labels import IGNORE
from cmai_fast.mbat import maximise
from cmai_fast.mbat.inner import reworded
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel, WordBall
from families import FAMILIES

GENERATIVE = [f for f in FAMILIES if f.kind == "generative"]
OTHERS = [f for f in FAMILIES if f.kind != "generative"]
BALLS = [WordBall("l2", 0.3), WordBall("linf", 0.3)]
LINF = ThreatModel("linf", 1.5 / 255)


def names(value):
    return getattr(value, "name", None) or f"{value.norm}"


@pytest.fixture
def case():
    """(bridge, batch, texts, h_v) of a small LLaVA in float64."""
    return opened(next(f for f in GENERATIVE if f.name == "LLaVA"))


def opened(family):
    model = copy.deepcopy(family.model()).double().eval()
    bridge = bridge_of(model)
    batch = family.batch(model, family.samples())
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    image, texts = bridge.inputs(batch)
    with torch.no_grad():
        features = bridge.encode_image(batch["pixel_values"], **image)
    return bridge, batch, texts, features


def prompts(bridge, texts):
    ids = texts["input_ids"]
    return (texts["labels"] == IGNORE) & (texts["attention_mask"] > 0) & (ids != bridge.model.config.image_token_id)


def radii(bridge, texts, ball):
    """What each word may be moved by, (N, L): its length, or root mean square, times eps."""
    own = bridge.model.get_input_embeddings()(texts["input_ids"]).detach().float()  # Gemma's are scaled there
    return ball.eps * (own.norm(dim=-1) if ball.norm == "l2" else own.square().mean(-1).sqrt()) * prompts(bridge, texts)


def losses_at(bridge, texts, features, delta):
    """L_task with `delta` added to the embeddings, by the embedding module: not the way of the code under test."""
    embed = bridge.model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda m, a, out: out + delta)
    try:
        return bridge.losses(features, **texts)[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("ball", BALLS, ids=names)
@pytest.mark.parametrize("family", GENERATIVE, ids=names)
def test_the_gradient_at_the_words_takes_them_to_a_corner_of_the_ball(family, ball):
    """For every generative family, the first step is the maximum of the linearised loss, and nothing else moves."""
    bridge, _, texts, features = opened(family)
    delta = torch.zeros(*texts["input_ids"].shape, bridge.text_dim, dtype=torch.float64, requires_grad=True)
    losses = losses_at(bridge, texts, features, delta)
    (slope,) = torch.autograd.grad(losses.sum(), delta)
    words = Words(bridge, texts, ball)
    with words.said():
        again, _ = bridge.losses(features.requires_grad_(), **texts)
    torch.testing.assert_close(again, losses)
    torch.autograd.grad(again.sum(), features)
    assert words.known.all()
    words.climb(2.0)
    radius = radii(bridge, texts, ball)[..., None]
    way = slope.float().sign() if ball.norm == "linf" else slope.float() / slope.float().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(words.delta, (radius * way).nan_to_num(0.0), rtol=1e-3, atol=1e-6)
    with words.said(), torch.no_grad():
        moved, _ = bridge.losses(features, **texts)
    torch.testing.assert_close(moved, losses_at(bridge, texts, features, words.delta.double()).detach())
    assert not torch.equal(moved, losses.detach())


@pytest.mark.parametrize("ball", BALLS, ids=names)
def test_more_steps_find_more_and_stay_in_the_ball(case, ball):
    bridge, _, texts, features = case
    found = []
    for steps in (0, 1, 8):
        words = Words(bridge, texts, ball)
        if steps:
            _, passes = reworded(words, features, "pgd", steps=steps)
            assert passes.full_backward == steps and passes.vision_backward == 0
        found.append(losses_at(bridge, texts, features, words.delta.double()).detach())
        size = words.delta.norm(dim=-1) if ball.norm == "l2" else words.delta.abs().amax(-1)
        assert (size <= radii(bridge, texts, ball) * (1 + 1e-6)).all()
    assert (found[1] > found[0]).all() and found[2].mean() > found[1].mean()


def test_the_bridge_moves_words_with_the_gradient_of_the_clean_pass_alone(case):
    bridge, _, texts, features = case
    words = Words(bridge, texts, BALLS[0])
    leaf = features.clone().requires_grad_()
    with words.said():
        clean = bridge.losses(leaf, **texts)[0]
    torch.autograd.grad(clean.sum(), leaf)
    _, passes = reworded(words, features, "bridge", refreshes=0)
    assert passes.full_backward == 0
    free = losses_at(bridge, texts, features, words.delta.double())
    assert (free > clean).all()
    one = Words(bridge, texts, BALLS[0])
    reworded(one, features, "fgsm")
    torch.testing.assert_close(words.delta, one.delta)


def test_an_attack_on_both_is_stronger_than_on_either(case):
    bridge, batch, texts, features = case
    space = PixelSpace([0.5, 0.4, 0.3], [0.5, 0.25, 0.2])

    def attacked(words, solver, **settings):
        victim = Victim(bridge, space, batch)
        victim.words = words
        result = maximise(victim, victim.pixels(), LINF, solver, steps=4, seed=1, **settings)
        with torch.no_grad():
            return victim(result.model_input).loss.mean(), victim.passes

    for solver, settings in (("pgd", {}), ("bridge", {"refreshes": 0}), ("bridge", {"refreshes": 1}), ("fgsm", {})):
        alone, plain = attacked(None, solver, **settings)
        both, passes = attacked(Words(bridge, texts, BALLS[0]), solver, **settings)
        words = Words(bridge, texts, BALLS[0])
        reworded(words, features, "pgd", steps=4)
        text = losses_at(bridge, texts, features, words.delta.double()).mean()
        assert both > alone and (both > text or solver != "pgd"), solver
        assert passes == plain  # the words cost no pass


@pytest.mark.parametrize("images", [True, False])
def test_words_of_fooled_samples_are_those_that_fooled(case64, images):
    """The answers are the model's own, so that each sample is right at first; the result is what breaks it."""
    victim, threat = case64.victim(), LINF if images else ThreatModel("linf", 0.0)
    assert victim.right(case64.clean).all()
    victim.words = Words(victim.bridge, victim.bridge.inputs(victim.batch)[1], WordBall("l2", 0.003))
    result = pgd(victim, case64.clean, threat, steps=6, seed=0)
    with torch.no_grad():
        right = victim(result.model_input).right
    assert torch.equal(result.fooled, ~right) and 0 < result.fooled.sum() < len(right)


def test_nothing_of_the_model_changes_and_hooks_go_also_after_an_exception(case):
    bridge, _, texts, features = case
    before = {k: v.clone() for k, v in bridge.model.state_dict().items()}
    needs = [p.requires_grad for p in bridge.model.parameters()]
    words = Words(bridge, texts, BALLS[0])
    reworded(words, features, "pgd", steps=2)
    with pytest.raises(RuntimeError, match="stop"), words.said():
        raise RuntimeError("stop")
    assert not bridge.model.get_decoder()._forward_pre_hooks
    assert [p.requires_grad for p in bridge.model.parameters()] == needs
    assert all(p.grad is None for p in bridge.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in bridge.model.state_dict().items())


@pytest.mark.parametrize("family", OTHERS, ids=names)
def test_models_without_a_prompt_in_their_sequence_are_refused(family):
    model = family.model()
    batch = family.batch(model, family.samples())
    bridge = bridge_of(model)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no prompt and response in one sequence"):
        Words(bridge, bridge.inputs(batch)[1], BALLS[0])


def test_a_leaf_that_the_embedding_makes_is_no_path(case):
    """Gradient checkpointing of adapters lets the embedding's output require a gradient."""
    bridge, _, texts, features = case
    plain, hooked = Words(bridge, texts, BALLS[0]), []
    reworded(plain, features, "pgd", steps=3)
    bridge.model.enable_input_require_grads()
    try:
        hooked = Words(bridge, texts, BALLS[0])
        reworded(hooked, features, "pgd", steps=3)
    finally:
        bridge.model.disable_input_require_grads()
    assert torch.equal(plain.delta, hooked.delta) and not hooked.delta.requires_grad


def test_a_restart_begins_with_the_words_as_they_are(case64):
    victim = case64.victim()
    found = []
    for restarts in (1, 2):
        victim.words = Words(victim.bridge, victim.bridge.inputs(victim.batch)[1], WordBall("l2", 1e-3))
        pgd(victim, case64.clean, ThreatModel("linf", 0.0), steps=3, restarts=restarts, seed=0)
        found.append(victim.words.delta.clone())
    torch.testing.assert_close(*found)  # at eps 0 every restart is the same


def test_apgd_refuses_words(case64):
    victim = case64.victim()
    victim.words = Words(victim.bridge, victim.bridge.inputs(victim.batch)[1], BALLS[0])
    with pytest.raises(ValueError, match="words are under attack, which APGD does not move"):
        apgd(victim, case64.clean, LINF, steps=2)


def test_bad_balls_are_refused():
    with pytest.raises(ValueError, match="text_norm is 'l1'; expected one of linf, l2"):
        WordBall("l1", 0.1)  # type: ignore[arg-type]
    for eps in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"text_eps is {eps}; expected a finite share"):
            WordBall("l2", eps)


def test_other_texts_than_those_under_attack_are_refused(case):
    bridge, batch, texts, features = case
    victim = Victim(bridge, PixelSpace([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]), batch)
    victim.words = Words(bridge, texts, BALLS[0])
    with pytest.raises(ValueError, match="other texts are asked for"):
        _ = Outputs(victim, features, None, dict(texts)).losses
