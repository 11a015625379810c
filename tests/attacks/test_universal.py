"""One perturbation for all samples, and one image in place of all pictures: optimum, budget, and what they break."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.attacks.universal import order, universal_perturbation
from cmai_fast.attacks.universal_image import universal_image
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation import protocol
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.state import State
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.surface import victim_of
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import Surface, ThreatModel
from cmai_fast.workflows.attack import attack
from cmai_fast.workflows.samples import asked
from fitted import colours, fitted
from linear_bridge import SHAPE, SPACE
from linear_classes import ClassesBridge
from typed_prompts import snapshot

INNER = 0.4 + 0.2 * torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BLANK = ThreatModel("linf", 64 / 255, Surface("blank"))


def towards(number: int, rows: slice, bridge: ClassesBridge) -> list:
    """A batch whose loss is z_number - z_0, which is linear in the image."""
    count = len(INNER[rows])
    victim = bridge.of_class([0] * count)
    victim.others.aim = torch.full((count,), number)
    return [victim]


@pytest.mark.parametrize("norm, eps", [("linf", 16 / 255), ("l2", 0.3)])
def test_the_optimum_is_known_where_losses_are_linear(norm, eps):
    """Two batches that pull to different classes: the best perturbation goes along the sum of both gradients."""
    bridge, threat = ClassesBridge(lead=80.0), ThreatModel(norm, eps)
    parts = (slice(0, 4), slice(4, 6))
    batches = [towards(k, part, bridge) for k, part in zip((1, 4), parts, strict=True)]
    w = bridge.model.weight.detach()
    pull = [(w[k] - w[0]).view(SHAPE) / SPACE.std.double()[:, None, None] for k in (1, 4)]
    found = universal_perturbation(batches[:1], threat, steps=20, loss="margin", images=[INNER[:4]])
    best = eps * (pull[0].sign() if norm == "linf" else pull[0] / pull[0].norm())
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)
    found = universal_perturbation(
        batches, threat, steps=100, loss="margin", images=[INNER[part] for part in parts], clip=1e9
    )
    assert threat.distance(found[None]).item() <= eps + 1e-12
    # Momentum adds up both gradients, each at its own length.
    length = (lambda g: g.abs().mean()) if norm == "linf" else (lambda g: g.norm())
    both = sum(g / length(g) for g in pull)
    sure = both.abs() > 0.1 * both.abs().mean()
    assert (found.sign() == both.sign())[sure].all()
    along = [float((found * g).sum() / (best * pull[0]).sum()) for g in pull]
    assert min(along) > 0.2


def test_a_sample_that_is_far_gone_is_left_alone():
    """Beyond `clip` the first batch has no say any more."""
    bridge, threat = ClassesBridge(lead=0.0), ThreatModel("linf", 16 / 255)
    batches = [towards(1, slice(0, 3), bridge), towards(4, slice(3, 6), bridge)]
    images = [INNER[:3], INNER[3:]]
    alone, free = (
        universal_perturbation(batches, threat, steps=40, loss="margin", images=images, clip=clip)
        for clip in (0.0, 1e9)
    )
    assert not torch.equal(alone, free)
    with pytest.raises(ValueError, match=r"universal: clip is -1\.0"):
        AttackSpec("universal", settings={"clip": -1})


def test_every_batch_has_its_turn():
    seen = list(order(5, 13, seed=3))
    assert len(seen) == 13 and sorted(seen[:5]) == sorted(seen[5:10]) == list(range(5))
    assert seen == list(order(5, 13, seed=3)) != list(order(5, 13, seed=4))


@pytest.fixture
def halves(make_tiny):
    """The fitted model, with a sample of each colour to search on, and one to measure on."""
    first = {sample.answer: sample for sample in reversed(colours())}
    return fitted(make_tiny), list(first.values()), [s for s in colours() if s is not first[s.answer]]


def test_it_is_found_once_per_run_on_the_training_samples(halves):
    pipeline, training, held_out = halves
    threat, spec = ThreatModel("linf", 32 / 255), AttackSpec("universal", 12, settings={"batch": 4})
    before, state = snapshot(pipeline.model), State.temporary()
    runner = Runner(pipeline, held_out, training=training, batch_size=6, state=state)
    attacked = runner.attack(spec, threat, keep=True)
    assert snapshot(pipeline.model) == before
    delta = runner.universal.find(spec, threat)
    assert float(delta.abs().max()) == pytest.approx(threat.eps)
    for row, own in enumerate(runner.images(range(len(held_out)))):
        torch.testing.assert_close(attacked.images[row], (own + delta).clamp(0, 1))
    assert attacked.forwards.tolist() == [1] * 6 and attacked.backwards.tolist() == [0] * 6
    # The same in other batches, and found once per run.
    measured = protocol.measure(pipeline, held_out, threat, [spec], training=training, batch_size=4)
    assert measured.attacked[spec.key].predictions == attacked.predictions
    assert torch.equal(measured.runner.universal.find(spec, threat), delta)
    resumed = Runner(pipeline, held_out, state=state)
    assert torch.equal(resumed.universal.find(spec, threat), delta)
    found = resumed.universal.record(spec, threat)
    assert found["samples"] == 6 and found["passes"]["full_backward"] == 12


@pytest.mark.parametrize("surface", [Surface("upload"), Surface("patch", size=0.25)], ids=lambda s: s.name)
def test_it_is_one_change_of_every_uploaded_picture(halves, surface):
    pipeline, training, held_out = halves
    threat, spec = ThreatModel("linf", 32 / 255, surface), AttackSpec("universal", 4, settings={"batch": 6})
    runner = Runner(pipeline, held_out, training=training, surface=surface)
    attacked = runner.attack(spec, threat, keep=True)
    own = [runner.images([row])[0] for row in range(len(held_out))]
    changes = torch.stack([attacked.images[row] - image for row, image in enumerate(own)])
    assert 0 < float(changes.abs().max()) <= threat.eps + 1e-6
    # One delta, but for where 0 and 1 cut it; 8-bit pictures stay 8-bit pictures.
    delta = runner.universal.find(spec, threat)
    for row, image in enumerate(own):
        levels = 255 * attacked.images[row]
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        away = (attacked.images[row] - (image + delta.cpu()).clamp(0, 1)).abs().max()
        assert away <= 1 / 255 + 1e-6


def test_it_breaks_held_out_samples_of_the_bundled_model_more_than_noise_does():
    training, held_out = (
        asked(DataSource("easyvqa"), split, "vqa", n, 0) for split, n in (("train", 96), ("test", 64))
    )
    threat = ThreatModel("linf", 32 / 255)
    runner = Runner(Pipeline.load("easyvqa-llava"), held_out, training=training)
    attacked = runner.attack(AttackSpec("universal", 20, settings={"batch": 16}), threat)
    assert attacked.right.sum() <= runner.noise(threat, 0).sum() - 4


def test_called_by_name_it_is_found_on_the_batch_itself(case64):
    victim, threat = case64.victim(), ThreatModel("l2", 1.0)
    own = victim(case64.space.to_model(case64.clean), None).loss
    result = ATTACKS["universal"](victim, case64.clean, threat, steps=10, loss="cross-entropy")
    assert result.loss.mean() > own.mean() and victim.passes.full_backward == 10
    assert (threat.distance(result.adv - case64.clean) <= 1 + 1e-9).all()
    moved = result.adv - case64.clean
    inside = ((result.adv > 0) & (result.adv < 1)).all(0)
    torch.testing.assert_close(moved[:, inside], moved[:1, inside].expand(6, -1), rtol=0, atol=1e-12)


def test_one_picture_gives_the_targets_for_every_prompt_also_in_8_bits(halves):
    pipeline, training, held_out = halves
    spec = AttackSpec("universal-image", 60, settings={"batch": 6, "rate": 0.1}, target="red|blue")
    runner = Runner(pipeline, held_out, training=training, surface=BLANK.surface)
    attacked = runner.attack(spec, BLANK, keep=True)
    assert sorted(held_out[i].answer for i in attacked.rows) == ["black", "green", "teal", "yellow"]
    assert attacked.predictions_8bit == attacked.predictions and set(attacked.predictions) <= {"red", "blue"}
    pictures = [attacked.images[i] for i in attacked.rows]
    assert all(torch.equal(p, pictures[0]) for p in pictures)
    assert float((pictures[0] - 128 / 255).abs().max()) <= BLANK.eps + 1e-6
    one = [s for s in training if s.answer == "red"]
    reds = Runner(pipeline, held_out, training=one, surface=BLANK.surface)
    with pytest.raises(ValueError, match="the target 'red' is right for every one of 1 training samples"):
        reds.attack(replace(spec, target="red"), BLANK)


def test_several_models_at_once(halves, make_tiny):
    """The sum of the losses falls for both models, and each has its share of the gradient."""
    pipeline, training, _ = halves
    second = Pipeline("second", *make_tiny(seed=1))
    wanted = [replace(s, references=("red",)) for s in training]

    def batch():
        found = [victim_of(p, p.collate(wanted)) for p in (pipeline, second)]
        for victim in found:
            victim.targeted, victim.exact = True, False
        return found

    grey = torch.full((len(wanted), 3, 64, 64), 128 / 255)
    threat = ThreatModel("linf", 64 / 255)
    losses = lambda delta: [v(v.space.to_model(grey + delta)).loss.detach() for v in batch()]  # noqa: E731
    both = universal_image([batch()], threat, steps=20, rate=0.1, images=[grey])
    alone = universal_image([batch()[:1]], threat, steps=20, rate=0.1, images=[grey])
    at = [[float(x.mean()) for x in losses(delta)] for delta in (torch.zeros(3, 64, 64), both, alone)]
    assert at[1][0] < at[0][0] and at[1][1] < min(at[0][1], at[2][1])
    assert float(both.abs().max()) < threat.eps
    untargeted = batch()
    untargeted[1].targeted = False
    with pytest.raises(ValueError, match="one is not `targeted`"):
        universal_image([untargeted], threat, steps=1)


def test_refused(halves, tmp_path):
    pipeline, training, held_out = halves
    with pytest.raises(ValueError, match=r"universal finds one perturbation on other samples .* there are none"):
        Runner(pipeline, held_out).attack(AttackSpec("universal", 1), ThreatModel())
    with pytest.raises(ValueError, match="restarts is 2, expected 1"):
        AttackSpec("universal", 1, restarts=2)
    with pytest.raises(ValueError, match="universal-image needs a target"):
        AttackSpec("universal-image")
    with pytest.raises(ValueError, match="samples is 0"):
        AttackSpec("universal", settings={"samples": 0})
    with pytest.raises(ValueError, match="target is empty"):
        AttackSpec("universal-image", target="red|")
    with pytest.raises(ValueError, match="has no samples to search on"):
        universal_perturbation([], ThreatModel(), steps=1)
    sizes = [torch.zeros(6, 3, 64, 64), torch.zeros(6, 3, 32, 64)]
    small = [victim_of(pipeline, pipeline.collate(training)) for _ in range(2)]
    with pytest.raises(ValueError, match="one image per sample, all of one size"):
        universal_perturbation([[v] for v in small], ThreatModel(), steps=1, images=sizes)
    (tmp_path / "one.jsonl").write_text('{"id": "a", "image": "x.png", "question": "what?", "answer": "red"}\n')
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="is one set of records"):
        attack(
            "easyvqa-llava", DataSource(str(tmp_path / "one.jsonl")), "universal", ThreatModel(), out=tmp_path / "o"
        )  # fmt: skip
