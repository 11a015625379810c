"""FARE and Sim-CLIP: training on image features alone."""

from __future__ import annotations

import copy

import pytest
import torch

from cmai_fast import ops
from cmai_fast.attacks import Victim
from cmai_fast.bridge import bridge_of
from cmai_fast.data import VQACollator
from cmai_fast.defences import DEFENCES
from cmai_fast.evaluation.overhead import step_overhead
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat.features import cosine_distance, squared_distance
from cmai_fast.pipeline import Pipeline

BARE = {"beta": 0.0, "gamma": 0.0, "lam": 1.0, "trainable": "vision", "inner": "pgd"}


@pytest.fixture
def feature_trainer(make_tiny, data, tmp_path):
    """`feature_trainer(objective, model=None, **config)`; the trainer of a tiny model."""

    def make(objective, model=None, given=None, **config):
        tiny, processor = make_tiny()
        settings = {
            "output_dir": str(tmp_path / "out"), "inner_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2, "report_to": "none", "disable_tqdm": True,
            "use_cpu": True, "lr_scheduler_type": "constant",
        } | BARE | config  # fmt: skip
        return MBATTrainer(
            model or tiny, MBATConfig(objective=objective, **settings), train_dataset=data,
            data_collator=VQACollator(processor), processing_class=processor, **(given or {}),
        )  # fmt: skip

    return make


def by_hand(trainer, inputs, original):
    """Loss and gradients of the vision side of a step, written plainly; the attack is one step of `fgsm`."""
    bridge, args = trainer.bridge, trainer.args
    image, _ = bridge.inputs(inputs)
    encode = lambda b, x: b.encode_image(x, **image)  # noqa: E731
    with torch.no_grad():
        own = encode(bridge, inputs["pixel_values"])
        target = encode(bridge_of(original), inputs["pixel_values"]) if args.objective == "fare" else own
    distance = squared_distance if args.objective == "fare" else cosine_distance
    victim = Victim(bridge, trainer.space, inputs)
    clean = victim.pixels()
    adv, eps = torch.empty_like(clean), torch.full((len(clean),), args.eps)
    ops.random_start_(adv, clean, eps, inputs["sample_ids"], trainer._attack_seed, "linf")
    leaf = trainer.space.to_model(adv).requires_grad_()
    (grad,) = torch.autograd.grad(distance(encode(bridge, leaf), target).sum(), leaf)
    adv = (adv + 1.25 * args.eps * grad.sign()).clamp(clean - args.eps, clean + args.eps).clamp(0, 1)
    features = encode(bridge, trainer.space.to_model(adv))
    loss = distance(features, target).mean()
    if args.objective == "sim-clip":
        fresh = encode(bridge, inputs["pixel_values"])
        total = (loss + distance(fresh, features.detach()).mean()) / 2
    else:
        drift = distance(encode(bridge, inputs["pixel_values"]), target).mean()
        total = args.lam * loss + (1 - args.lam) * drift
    learning = [p for p in bridge.vision_parameters if p.requires_grad]
    return loss.detach(), torch.autograd.grad(total, learning, allow_unused=True), learning


@pytest.mark.parametrize(("objective", "lam"), [("fare", 1.0), ("fare", 0.5), ("sim-clip", 1.0)])
def test_a_step_is_the_published_loss(feature_trainer, batch, objective, lam):
    trainer = feature_trainer(objective, inner="fgsm", lam=lam)
    original = copy.deepcopy(trainer.model)
    with torch.no_grad():  # no longer the model that it began with
        for p in trainer.bridge.vision_parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    inputs = {k: v for k, v in batch.items() if not k.startswith("negative_")}
    loss, grads, learning = by_hand(trainer, inputs, original)
    trainer.training_step(trainer.model, dict(inputs))
    torch.testing.assert_close(trainer._logged["loss_adv"][0].to(loss), loss, rtol=1e-4, atol=1e-6)
    pairs = [(p.grad, g) for p, g in zip(learning, grads, strict=True) if g is not None]
    assert max(float(g.abs().max()) for _, g in pairs) > 1e-3
    for found, expected in pairs:  # on some processors a pixel's gradient rounds to another sign
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["fare", "sim-clip"])
def test_no_pass_of_the_language_side_and_it_learns(feature_trainer, objective):
    trainer = feature_trainer(objective, max_steps=12, inner_steps=1, eps=8 / 255, save_strategy="no")
    text = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    passes = trainer.passes
    assert passes.full_forward == passes.full_backward == passes.text_forward == 0
    assert passes.vision_forward == 12 * 3 and passes.vision_backward == 12 * (2 + (objective == "sim-clip"))
    losses = [entry["loss_adv"] for entry in trainer.state.log_history if "loss_adv" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in text.items())


def test_it_resumes_to_the_same_weights_and_in_parts(feature_trainer, make_tiny):
    whole = feature_trainer("fare")
    whole.train()
    resumed = feature_trainer("fare")
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    parts = feature_trainer("fare")
    parts._rows_at_once = 3
    parts.train()
    for a, b, c in zip(whole.model.parameters(), resumed.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


def test_what_means_nothing_is_refused(feature_trainer, tmp_path):
    for name, value in (
        ("beta", 0.1), ("gamma", 0.1), ("inner", "bridge"), ("inner", "none"), ("modality", "both"), ("arm", True),
        ("label_smoothing_factor", 0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} is .* and objective 'fare'; expected {name}"):
            MBATConfig(str(tmp_path), objective="fare", **(BARE | {name: value}))
    with pytest.raises(ValueError, match=r"lam is 0\.5 and objective 'sim-clip'"):
        MBATConfig(str(tmp_path), objective="sim-clip", **(BARE | {"lam": 0.5}))
    with pytest.raises(ValueError, match="objective is 'features'; expected one of task, fare, sim-clip"):
        MBATConfig(str(tmp_path), objective="features", **BARE)
    with pytest.raises(ValueError, match="compute_loss_func is given, and objective is 'fare'"):
        feature_trainer("fare", given={"compute_loss_func": lambda *a, **k: 0})
    trainer = feature_trainer("fare")
    trainer.args.objective = "sim-clip"
    with pytest.raises(ValueError, match="objective was 'fare' when the trainer was made and is 'sim-clip' now"):
        trainer.train()
    assert DEFENCES["fare"].values["objective"] == "fare"


def test_its_cost_is_that_over_a_clean_step_on_the_task(feature_trainer, make_tiny, batch):
    model, processor = make_tiny()
    args = feature_trainer("fare").args
    inputs = {k: v for k, v in batch.items() if not k.startswith("negative_")}
    found = step_overhead(Pipeline("tiny", model, processor), args, inputs, rounds=1)
    assert args.objective == "fare" and found["time_ratio"] > 0 and found["mbat_saved_bytes"] > 0
