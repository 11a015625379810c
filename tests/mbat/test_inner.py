"""The inner problem: what each solver costs, and that its gradients are those it claims."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmai_fast import ops
from cmai_fast.attacks import Passes, Victim, exact_gradient, weighted
from cmai_fast.attacks.gradients import refresh, vision_gradient
from cmai_fast.attacks.pgd import pgd
from cmai_fast.bridge import task_loss
from cmai_fast.data import load_dataset
from cmai_fast.mbat import SOLVERS, inner, maximise
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 8 / 255)


def bridge_gradient(victim, clean):
    """p of each sample at its clean image, as the clean branch of training makes it."""
    features = victim.bridge.encode_image(victim.space.to_model(clean)).detach().requires_grad_()
    (p,) = torch.autograd.grad(task_loss(*victim.bridge.fuse(features, **victim.batch)).sum(), features)
    return p


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 1.0)])
def test_bridge_that_refreshes_at_every_step_is_pgd(make_victim, clean, norm, eps, beta):
    threat = ThreatModel(norm, eps)
    loop = {"steps": 3, "step_size": eps / 2, "seed": 5}
    exact = maximise(make_victim(heads=True), clean, threat, "pgd", beta=beta, **loop)
    bridge = maximise(make_victim(heads=True), clean, threat, "bridge", beta=beta, refreshes=3, **loop)
    attack = pgd(make_victim(heads=True), clean, threat, loss=weighted(1.0, beta), early_stop=False, **loop)
    assert torch.equal(bridge.adv, exact.adv)
    torch.testing.assert_close(exact.adv, attack.adv, rtol=0, atol=1e-6)
    other = maximise(make_victim(heads=True), clean, threat, "pgd", beta=beta, **{**loop, "seed": 6})
    assert not torch.equal(other.adv, exact.adv)


@pytest.mark.parametrize(
    "solver, refreshes, with_p, full, vision",
    [
        ("pgd", 0, True, 4, 0),
        ("bridge", 0, True, 0, 4),
        ("bridge", 1, True, 1, 3),
        ("bridge", 2, True, 2, 2),
        ("bridge", 4, True, 4, 0),
        ("bridge", 0, False, 1, 4),  # p has to come from somewhere
        ("bridge", 4, False, 4, 0),  # step 0 makes it anyway
        ("fgsm", 0, True, 1, 0),
    ],
)
def test_passes(make_victim, clean, solver, refreshes, with_p, full, vision):
    victim = make_victim()
    p = bridge_gradient(victim, clean) if with_p else None
    victim.passes = Passes(full_forward=100)
    calls = {"encode_image": 0, "losses": 0}
    bridge = victim.bridge

    class Counting:
        def __getattr__(self, name):
            if name in calls:
                calls[name] += 1
            return getattr(bridge, name)

    victim.bridge = Counting()
    result = maximise(victim, clean, THREAT, solver, steps=4, refreshes=refreshes, bridge_gradient=p)
    assert result.passes == Passes(full, full, vision, vision)
    assert calls == {"encode_image": full + vision, "losses": full}
    assert victim.passes == Passes(100 + full, full, vision, vision)


def test_s_c_costs_one_text_pass(make_victim, clean):
    victim = make_victim(heads=True)
    result = maximise(victim, clean, THREAT, "bridge", beta=0.5, steps=3, bridge_gradient=torch.zeros(4, 16, 64))
    assert result.passes == Passes(vision_forward=3, vision_backward=3, text_forward=1)


def test_p_is_the_same_from_the_clean_branch_and_from_the_solver(make_victim, clean):
    victim, weights = make_victim(heads=True), {"alpha": 2.0, "beta": 0.3}
    given = maximise(
        victim, clean, THREAT, "bridge", steps=3, bridge_gradient=bridge_gradient(victim, clean), seed=1, **weights
    )
    made = maximise(make_victim(heads=True), clean, THREAT, "bridge", steps=3, seed=1, **weights)
    assert torch.equal(given.adv, made.adv)
    p = -1 * bridge_gradient(victim, clean)
    wrong = maximise(make_victim(heads=True), clean, THREAT, "bridge", steps=3, seed=1, bridge_gradient=p, **weights)
    assert not torch.equal(wrong.adv, made.adv)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_a_refresh_gives_the_exact_gradient(make_victim, clean, beta):
    victim, loss = make_victim(heads=True), weighted(1.5, beta)
    x = victim.space.to_model(clean)
    _, grad, at = refresh(victim, x, None, loss)
    exact, seen = exact_gradient(make_victim(heads=True), x, None, loss)
    # Rounding of a typical pixel's gradient, which is a hundred times larger.
    assert exact.abs().median() > 1e-5
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(at.loss, seen.loss)
    assert torch.equal(at.right, seen.right)


def parts_at(victim, moved, p):
    """h_v of the moved images, which depend on the leaf returned, and p and q there, as autograd finds them."""
    leaf = moved.clone().requires_grad_()
    features = victim.bridge.model.get_image_features(pixel_values=leaf, return_dict=True).pooler_output
    features = torch.stack(list(features))
    text = victim.heads.project_text(victim.bridge.encode_text(**victim.batch))
    s_c = F.cosine_similarity(victim.heads.project_image(features), text)
    (q,) = torch.autograd.grad(s_c.sum(), features, retain_graph=True)
    return leaf, features, q


@pytest.mark.parametrize("balance", ["direction", "none"])
def test_between_refreshes_only_the_language_model_is_linearised(make_victim, clean, balance):
    """The gradient at a moved image is that of <alpha p / |p| - beta q / |q|, h_v>, or of the sum itself: p is stale,
    E_v and q are not."""
    victim = make_victim(heads=True)
    p = bridge_gradient(victim, clean)
    noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0))
    moved = victim.space.to_model((clean + 0.1 * noise).clamp(0, 1))
    grad = vision_gradient(victim, moved, 1.5 * p, None, weighted(1.5, 0.7, balance=balance))

    leaf, features, q = parts_at(victim, moved, p)
    if balance == "direction":
        p, q = (torch.stack([row / row.norm() for row in rows]) for rows in (p, q))
    language, consistency = (
        torch.autograd.grad((way * features).sum(), leaf, retain_graph=True)[0] for way in (1.5 * p, 0.7 * q)
    )
    # A hundredth of what S_c adds to a typical pixel, far above the rounding of a CPU without AVX-512.
    assert consistency.abs().median() > 1e-4
    torch.testing.assert_close(grad, language - consistency, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver, refreshes", [("bridge", 0), ("bridge", 1), ("pgd", 0)])
def test_beta_is_the_share_of_consistency_in_every_solver_at_the_scale_of_real_features(solver, refreshes):
    """h_v of this model has norms of hundreds, where the raw sum knows nothing between no beta and beta alone."""
    pipeline = Pipeline.load("easyvqa-llava")
    batch = pipeline.collate(load_dataset("easyvqa", "train", 12, seed=3)[:12])
    victim = Victim(pipeline.bridge, pipeline.space, batch, pipeline.heads)
    pixels, found = victim.pixels(), {}
    with torch.no_grad():
        assert victim.encode(victim.space.to_model(pixels)).flatten(1).norm(dim=1).min() > 100
    for beta in (0.0, 0.3, 1.0):
        result = maximise(victim, pixels, THREAT, solver, beta=beta, steps=4, refreshes=refreshes, seed=1)
        with torch.no_grad():
            features = victim.encode(result.model_input)
            found[beta] = victim.score(features).mean().item(), victim.outputs(features).losses.mean().item()
    s_c, task = zip(*found.values(), strict=True)
    # Each beta moves S_c by more than a hundredth, and the larger one further; L_task rises under all of them.
    assert s_c[0] - s_c[1] > 0.01 and s_c[1] - s_c[2] > 0.01
    start = victim(victim.space.to_model(pixels)).loss.mean().item()
    assert min(task) > start + 0.1
    # A beta of 0.3 leaves the task most of its direction.
    assert task[1] - start > 0.5 * (task[0] - start)


def test_a_sample_that_the_model_is_sure_of_is_attacked_as_any_other(make_victim, clean):
    """Its p is tiny: beta must not drown it, and zero must not become NaN."""
    p = bridge_gradient(make_victim(), clean)
    runs = [
        maximise(make_victim(heads=True), clean, THREAT, "bridge", beta=0.4, steps=3, bridge_gradient=scale * p).adv
        for scale in (1.0, 1e-6)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-6)
    nothing = maximise(make_victim(heads=True), clean, THREAT, "bridge", beta=0.4, steps=3, bridge_gradient=0 * p).adv
    assert nothing.isfinite().all()


def test_the_loop_against_one_written_out_by_hand(make_victim, clean):
    """K = 4, R = 1: steps 0 and 1 with the p given, step 2 with a new one, which step 3 goes on with."""
    p, eps = bridge_gradient(make_victim(), clean), THREAT.eps
    victim, loss = make_victim(heads=True), weighted(1.0, 0.4)
    result = maximise(victim, clean, THREAT, "bridge", beta=0.4, steps=4, refreshes=1, bridge_gradient=p, seed=9)
    adv = torch.empty_like(clean)
    ops.random_start_(adv, clean, torch.full((4,), eps), torch.arange(4), 9, "linf")
    for k in range(4):
        if k == 2:
            p = bridge_gradient(victim, adv)
            grad, _ = exact_gradient(victim, victim.space.to_model(adv), None, loss)
        else:
            grad = vision_gradient(victim, victim.space.to_model(adv), p, None, loss)
        adv = torch.maximum(
            torch.minimum(adv + (2.0, 1.5, 1.0, 0.5)[k] * eps * grad.sign(), clean + eps), clean - eps
        ).clamp(0, 1)
    differ = (result.adv - adv).abs() > 1e-6
    assert differ.float().mean() < 3e-4  # signs of gradients that are zero but for rounding


def test_staleness_is_one_where_nothing_moved(make_victim, clean):
    p = bridge_gradient(make_victim(), clean)
    still = maximise(make_victim(), clean, ThreatModel("linf", 0.0), "bridge", steps=2, refreshes=2, bridge_gradient=p)
    assert [s.shape for s in still.staleness] == [(4,), (4,)]
    torch.testing.assert_close(torch.stack(still.staleness), torch.ones(2, 4), rtol=0, atol=1e-4)
    moved = maximise(make_victim(), clean, ThreatModel("linf", 0.3), "bridge", steps=2, refreshes=1, bridge_gradient=p)
    assert len(moved.staleness) == 1 and (moved.staleness[0] < 0.999).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 0.5)])
def test_inside_ball_and_box_and_stronger_than_noise(make_victim, clean, solver, norm, eps):
    threat, victim = ThreatModel(norm, eps), make_victim()
    adv = maximise(victim, clean, threat, solver, steps=5, bridge_gradient=bridge_gradient(victim, clean)).adv
    assert threat.distance(adv - clean).max() <= eps * (1 + 1e-5)
    assert adv.min() >= 0 and adv.max() <= 1
    noise = torch.empty_like(clean)
    ops.random_start_(noise, clean, torch.full((4,), eps), torch.arange(4), 0, norm)
    loss = [victim(victim.space.to_model(x)).loss.mean().item() for x in (adv, noise)]
    assert loss[0] > loss[1]


def test_fgsm_is_one_step_of_a_quarter_more_than_eps(make_victim, clean):
    result = maximise(make_victim(), clean, THREAT, "fgsm", steps=10, seed=2)
    same = maximise(make_victim(), clean, THREAT, "pgd", steps=1, step_size=1.25 * THREAT.eps, seed=2)
    small = maximise(make_victim(), clean, THREAT, "fgsm", step_size=0.25 * THREAT.eps, seed=2)
    assert torch.equal(result.adv, same.adv)
    assert not torch.equal(result.adv, small.adv)


@pytest.mark.parametrize(
    "steps, refreshes, at", [(10, 0, set()), (10, 1, {5}), (10, 2, {3, 6}), (3, 2, {1, 2}), (2, 2, {0, 1})]
)
def test_refreshes_cut_the_steps_into_equal_parts(steps, refreshes, at):
    assert inner.refresh_steps(steps, refreshes) == at


@pytest.mark.parametrize("steps", range(1, 13))
def test_as_many_refreshes_as_asked_for(steps):
    assert [len(inner.refresh_steps(steps, r)) for r in range(steps + 1)] == list(range(steps + 1))


def test_bad_input(make_victim, clean):
    with pytest.raises(ValueError, match=r"inner is 'pdg'; expected one of pgd, bridge, fgsm"):
        maximise(make_victim(), clean, THREAT, "pdg")
    with pytest.raises(ValueError, match=r"inner steps is 0"):
        maximise(make_victim(), clean, THREAT, "pgd", steps=0)
    with pytest.raises(ValueError, match=r"refreshes is 4; expected 0 to 3"):
        maximise(make_victim(), clean, THREAT, "bridge", steps=3, refreshes=4)


@pytest.mark.parametrize("fault", [False, True])
def test_the_model_comes_back_as_it_was(make_tiny, make_victim, clean, monkeypatch, fault):
    victim = make_victim(heads=True)
    model = make_tiny()[0].train()
    model.model.vision_tower.eval()
    victim.bridge = type(victim.bridge)(model)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.full_like(p, 2.0) if i % 2 else None
    before = ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    torch.manual_seed(11)
    rng = torch.get_rng_state()
    if fault:
        monkeypatch.setattr(victim.bridge, "fuse", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            maximise(victim, clean, THREAT, "bridge", beta=0.5, steps=2, refreshes=1)
    else:
        maximise(victim, clean, THREAT, "bridge", beta=0.5, steps=2, refreshes=1)
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert torch.equal(torch.get_rng_state(), rng)
    for i, p in enumerate(model.parameters()):
        assert p.grad is None if i % 2 == 0 else bool((p.grad == 2).all())
