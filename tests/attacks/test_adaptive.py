"""The adaptive attack: what it calls a success is one for the guard as it is deployed."""

from __future__ import annotations

import pytest
import torch

from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.attacks.adaptive import Evading
from cmai_fast.attacks.deployed import Deployed
from cmai_fast.attacks.gradients import Course
from cmai_fast.attacks.losses import cross_entropy
from cmai_fast.attacks.upload import UploadVictim
from cmai_fast.bridge import bridge_of
from cmai_fast.cmcv import Threshold
from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.cmcv.tower import beside
from cmai_fast.cmcv.verifier import Verifier, set_tower, tower_weights
from cmai_fast.data import load_dataset
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 16 / 255)


def guarded(kind: str, tau: float = 0.0) -> Pipeline:
    """The undefended model with a guard whose threshold lies among the scores of wrong answers."""
    pipeline = Pipeline.load("easyvqa-llava", calibrated=False)
    if kind != "heads":
        kinds = Alternatives.of(load_dataset("easyvqa", "train", 64, seed=0))
        tower = None
        if kind == "tower":
            tower = beside(pipeline.bridge)
            set_tower(bridge_of(tower), tower_weights(Pipeline.load("easyvqa-llava-immune").bridge))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            tokenizer = pipeline.processor.tokenizer
            verifier = Verifier.new(pipeline.bridge, tokenizer, kinds, tower, width=16, dim=8, heads=2)
        verifier.network.requires_grad_(False)
        pipeline.verifier = verifier
    pipeline.threshold = Threshold(tau, 0.05, 9, "calibration", pipeline.generation)
    return pipeline


def victim_of(pipeline: Pipeline, samples) -> Victim:
    batch = pipeline.on_device(pipeline.collate(samples))
    victim = Victim(pipeline.bridge, pipeline.space, batch, pipeline.heads)
    victim.deployed = Deployed(pipeline, samples)
    return victim


@pytest.fixture(scope="module")
def samples():
    return list(load_dataset("easyvqa", "test", 12, seed=3))


@pytest.mark.parametrize(
    "mode, kind",  # the mode sees two numbers, whatever kind of guard they are of
    [("selective", "heads"), ("orthogonal", "heads"), ("lagrangian", "heads"), ("all", "own"), ("all", "tower")],
)
def test_what_it_fools_the_guard_accepts(samples, kind, mode):
    pipeline = guarded(kind)
    wrong = Deployed(pipeline, samples).wrong()
    pairs = [(s, answer) for s, answers in zip(samples, wrong, strict=True) for answer in answers]
    assert all(set(answers) == set(s.wrong_choices) for s, answers in zip(samples, wrong, strict=True))
    scores = pipeline.score(*zip(*pairs, strict=True))
    tau = scores.quantile(0.6).item()
    pipeline.threshold = Threshold(tau, 0.05, 9, "calibration", pipeline.generation)
    victim = victim_of(pipeline, samples)
    result = ATTACKS["adaptive"](victim, victim.pixels(), THREAT, steps=10, restarts=2, seed=1, mode=mode)
    assert 0 < result.fooled.sum() < len(samples)
    assert (result.adv - victim.pixels()).abs().max() <= THREAT.eps + 1e-6
    assert torch.equal(result.fooled, result.loss >= 0)
    answers, scores = pipeline.answer(samples, victim.split(result.adv))
    for fooled, answer, score, sample in zip(result.fooled, answers, scores, samples, strict=True):
        if fooled:
            assert score >= tau - 1e-4 and answer in sample.wrong_choices


def test_it_gets_past_a_guard_that_stops_plain_pgd(samples):
    pipeline = guarded("tower")
    victim = victim_of(pipeline, samples)
    plain = ATTACKS["pgd"](victim, victim.pixels(), THREAT, steps=10, early_stop=False)
    answers, scores = pipeline.answer(samples, victim.split(plain.adv))
    fooling = [v for v, a, s in zip(scores, answers, samples, strict=True) if a != s.answer]
    assert len(fooling) > 3
    tau = max(fooling) + 1e-3  # accepts none of them
    pipeline.threshold = Threshold(tau, 0.05, 9, "calibration", pipeline.generation)
    victim = victim_of(pipeline, samples)
    result = ATTACKS["adaptive"](victim, victim.pixels(), THREAT, steps=10, restarts=3)
    assert result.fooled.any()


def test_the_orthogonal_step_leaves_the_other_term_alone(samples):
    pipeline = guarded("tower")
    victim = victim_of(pipeline, samples)
    aim = victim.deployed.aim([w[0] for w in victim.deployed.wrong()])
    x = victim.space.to_model(victim.pixels())
    with victim.attack_mode(), victim.deployed.frozen():
        gradient = Evading(aim, "orthogonal", torch.ones(len(samples)))
        course = Course(victim, cross_entropy, victim.pixels(), torch.arange(len(samples)), 1)
        grad, at = gradient.start(course)(x, None, 0)
        leaf = x.clone().requires_grad_()
        lead, excess = gradient.parts(victim, leaf, None)
        of_lead, of_excess = (torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in (lead, excess))
    other = torch.where((lead <= 0).view(-1, 1, 1, 1), of_excess, of_lead)
    wanted = torch.where((lead <= 0).view(-1, 1, 1, 1), of_lead, of_excess)
    dot = lambda a, b: torch.cosine_similarity(a.flatten(1), b.flatten(1))  # noqa: E731
    assert dot(grad, other).abs().max() < 1e-4 and (dot(grad, wanted) > 0.05).all()
    torch.testing.assert_close(at.loss, torch.minimum(lead, excess).detach())


def test_the_gradient_of_an_uploaded_picture_is_that_of_the_models_input(samples):
    """Pictures of the model's size are not resized: the two differ by the normalisation alone. The tower sees both."""
    pipeline = guarded("tower")
    plain = victim_of(pipeline, samples)
    upload = UploadVictim(pipeline.bridge, pipeline.space, pipeline.collate, samples)
    aim = plain.deployed.aim([w[0] for w in plain.deployed.wrong()])
    found = []
    for victim in (plain, upload):
        x = victim.space.to_model(victim.pixels())
        with victim.attack_mode(), plain.deployed.frozen():
            gradient = Evading(aim, "lagrangian", torch.ones(len(samples)))
            course = Course(victim, cross_entropy, victim.pixels(), torch.arange(len(samples)), 1)
            grad, at = gradient.start(course)(x, None, 0)
        found.append((grad / victim.space.std[:, None, None], at.loss))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fault", [False, True])
def test_the_model_and_its_guard_come_back_as_they_were(samples, monkeypatch, fault):
    pipeline = guarded("tower")
    victim = victim_of(pipeline, samples)
    parts = (pipeline.model.train(), pipeline.verifier.network.train(), pipeline.verifier.tower)
    pipeline.verifier.network.requires_grad_(True)
    state = lambda: [([m.training for m in p.modules()], [q.requires_grad for q in p.parameters()]) for p in parts]  # noqa: E731
    before, rng = state(), torch.get_rng_state()
    if fault:
        monkeypatch.setattr(victim.bridge, "fuse", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ATTACKS["adaptive"](victim, victim.pixels(), THREAT, steps=2, restarts=1)
    else:
        ATTACKS["adaptive"](victim, victim.pixels(), THREAT, steps=2, restarts=1)
    assert state() == before and torch.equal(torch.get_rng_state(), rng)
    assert all(q.grad is None for p in parts for q in p.parameters())


def test_bad_input(samples):
    pipeline = guarded("heads")
    victim = Victim(pipeline.bridge, pipeline.space, pipeline.collate(samples))
    with pytest.raises(ValueError, match="needs a guarded model"):
        ATTACKS["adaptive"](victim, victim.pixels(), THREAT, steps=2)
    pipeline.threshold = None
    with pytest.raises(ValueError, match="easyvqa-llava has no guard"):
        Deployed(pipeline, samples)
    with pytest.raises(ValueError, match="mode is 'fast'; expected one of selective, orthogonal, lagrangian, or all"):
        ATTACKS["adaptive"].read({"mode": "fast"})
    with pytest.raises(ValueError, match="targets is 0"):
        ATTACKS["adaptive"].read({"targets": "0"})
