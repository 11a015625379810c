"""MBATTrainer: its gradients against the plain formula, what it trains, and what its checkpoints hold."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from cmai_fast.attacks import Passes, Victim
from cmai_fast.bridge import Bridge, output_layer, task_loss
from cmai_fast.bridge.output_layer import OutputLayer
from cmai_fast.bridge.token_loss import token_losses
from cmai_fast.cmcv import ConsistencyHeads, contrastive_loss, packed_text, text_groups
from cmai_fast.mbat import MBATConfig, MBATTrainer, checkpoints, consistency, last_checkpoint
from cmai_fast.mbat import step as step_module


def naive_loss(model, space, heads, batch, adv, lam, gamma):
    """(1 - lam) * L_clean + lam * L_adv + gamma * L_contrastive, for one plain backward."""
    bridge = Bridge(model)
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    wrong = {k: batch[f"negative_{k}"].flatten(0, 1) for k in text}
    clean = bridge.encode_image(batch["pixel_values"])
    attacked = bridge.encode_image(space.to_model(adv))
    own, other = (heads.project_text(bridge.encode_text(**t).detach()) for t in (text, wrong))
    groups = text_groups(packed_text(text["input_ids"], text["attention_mask"]))
    contrastive = [
        contrastive_loss(heads, heads.project_image(h), own, other, groups=groups) for h in (clean, attacked)
    ]
    parts = {
        "loss_clean": task_loss(*bridge.fuse(clean, **text)).mean(),
        "loss_adv": task_loss(*bridge.fuse(attacked, **text)).mean(),
        "loss_contrastive": sum(contrastive) / 2,
    }
    weights = {"loss_clean": 1 - lam, "loss_adv": lam, "loss_contrastive": gamma}
    return sum(weights[k] * v for k, v in parts.items()), parts


class Recording:
    """Keeps each batch, and the adversarial images that the trainer made for it."""

    def __init__(self, trainer):
        self.batches, self.adv = [], []
        attack, step = trainer._attack, trainer.training_step

        def keep_adv(*args):
            result = attack(*args)
            self.adv.append(result.adv)
            return result

        def keep_batch(model, inputs, *args):
            self.batches.append({k: v.clone() for k, v in inputs.items()})
            return step(model, inputs, *args)

        trainer._attack, trainer.training_step = keep_adv, keep_batch


def parameters(trainer):
    return {
        **{f"model.{k}": v.detach().clone() for k, v in trainer.model.named_parameters()},
        **{f"heads.{k}": v.detach().clone() for k, v in trainer.heads.named_parameters()},
    }


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("inner", ["bridge", "pgd"])
def test_gradients_are_those_of_the_formula(make_trainer, batch, lam, inner):
    trainer = make_trainer(lam=lam, gamma=0.3, inner=inner, beta=0.2)
    recording = Recording(trainer)
    model, heads = copy.deepcopy(trainer.model).train(), copy.deepcopy(trainer.heads)
    total = trainer.training_step(trainer.model, batch)
    loss, _ = naive_loss(model, trainer.space, heads, batch, recording.adv[0], lam, 0.3)
    loss.backward()
    torch.testing.assert_close(total, loss.detach())
    assert (recording.adv[0] - trainer.space.to_pixels(batch["pixel_values"])).abs().max() > 0.02
    for mine, plain in ((trainer.model, model), (trainer.heads, heads)):
        expected = dict(plain.named_parameters())
        for name, p in mine.named_parameters():
            grad = expected[name].grad
            assert (p.grad is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_bridge_gradient_is_that_of_each_sample_alone(make_trainer, batch, monkeypatch, lam, accumulation):
    """Neither lam, nor the batch size, nor accumulation may scale p: the inner problem weighs it against S_c."""
    trainer = make_trainer(lam=lam, gradient_accumulation_steps=accumulation)
    trainer.current_gradient_accumulation_steps = accumulation
    seen, attack = [], step_module.maximise
    monkeypatch.setattr(
        step_module, "maximise", lambda *a, **k: seen.append(k["bridge_gradient"].clone()) or attack(*a, **k)
    )
    trainer.training_step(trainer.model, batch)
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    features = trainer.bridge.encode_image(batch["pixel_values"]).detach().requires_grad_()
    (p,) = torch.autograd.grad(task_loss(*trainer.bridge.fuse(features, **text)).sum(), features)
    torch.testing.assert_close(seen[0], p, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_follows_the_formula(make_trainer, accumulation):
    """Weights after three optimiser steps of `train()`, by plain SGD: a gradient scaled or kept too long would show."""
    trainer = make_trainer(
        gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        learning_rate=0.05, heads_learning_rate=0.1, lam=0.4, gamma=0.5, max_steps=3, save_strategy="no",
    )  # fmt: skip
    recording = Recording(trainer)
    model, heads = copy.deepcopy(trainer.model).train(), copy.deepcopy(trainer.heads)
    begin = parameters(trainer)
    trainer.train()

    groups = [
        {"params": list(model.parameters()), "lr": 0.05},
        {"params": list(heads.parameters()), "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups)
    pairs = list(zip(recording.batches, recording.adv, strict=True))
    losses = []
    assert len(pairs) == 3 * accumulation
    for start in range(0, len(pairs), accumulation):
        optimizer.zero_grad()
        micro = [naive_loss(model, trainer.space, heads, b, adv, 0.4, 0.5) for b, adv in pairs[start:][:accumulation]]
        loss = sum(total for total, _ in micro) / accumulation
        loss.backward()
        losses.append((loss.item(), sum(parts["loss_clean"].item() for _, parts in micro) / accumulation))
        optimizer.step()
    after = parameters(trainer)
    expected = {f"model.{k}": v for k, v in model.named_parameters()}
    expected |= {f"heads.{k}": v for k, v in heads.named_parameters()}
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-3, atol=2e-5, msg=name)
    assert (after["heads.image_out.weight"] - begin["heads.image_out.weight"]).abs().max() > 1e-3
    logs = [entry for entry in trainer.state.log_history if "loss_clean" in entry]
    for entry, (total, clean) in zip(logs, losses, strict=True):
        assert entry["loss"] == pytest.approx(total, abs=2e-4)
        assert entry["loss_clean"] == pytest.approx(clean, abs=2e-4)
        assert {"loss_adv", "loss_contrastive", "s_c_adv", "beta"} <= set(entry)


@pytest.mark.parametrize(
    "config, expected",
    [
        # clean and adversarial branch: 2 full; right and wrong answers, also for S_c in the inner problem: 2 text
        ({"inner": "bridge", "beta": 0.0}, Passes(2, 2, 3, 3, 2)),
        ({"inner": "bridge", "beta": 0.1}, Passes(2, 2, 3, 3, 2)),
        ({"inner": "bridge", "beta": 0.1, "gamma": 0.0}, Passes(2, 2, 3, 3, 1)),
        ({"inner": "bridge", "refreshes": 1, "beta": 0.0}, Passes(3, 3, 2, 2, 2)),
        ({"inner": "pgd", "beta": 0.0}, Passes(5, 5, 0, 0, 2)),
        ({"inner": "fgsm", "beta": 0.0}, Passes(3, 3, 0, 0, 2)),
        ({"inner": "none", "beta": 0.0}, Passes(1, 1, 0, 0, 2)),
        ({"inner": "pgd", "beta": 0.0, "lam": 1.0}, Passes(4, 4, 0, 0, 2)),  # the clean branch is only looked at
    ],
)
def test_passes_of_a_step(make_trainer, batch, config, expected):
    trainer = make_trainer(inner_steps=3, arm=False, **config)
    trainer.training_step(trainer.model, batch)
    assert trainer.passes == expected


def test_without_an_inner_problem_it_is_fine_tuning(make_trainer, batch):
    trainer = make_trainer(inner="none", gamma=0.0, lam=0.7)
    plain = copy.deepcopy(trainer.model).train()
    total = trainer.training_step(trainer.model, batch)
    bridge = Bridge(plain)
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    loss = task_loss(*bridge.fuse(bridge.encode_image(batch["pixel_values"]), **text)).mean()
    loss.backward()
    torch.testing.assert_close(total, loss.detach())
    for p, q in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_vision_alone_can_be_trained(make_trainer):
    trainer = make_trainer(trainable="vision", max_steps=2, save_strategy="no")
    before = parameters(trainer)
    trainer.train()
    changed = {name for name, value in parameters(trainer).items() if not torch.equal(value, before[name])}
    assert any("vision_tower" in n for n in changed) and any("multi_modal_projector" in n for n in changed)
    assert not [n for n in changed if "language_model" in n or "lm_head" in n]
    assert all(p.grad is None for p in trainer.model.model.language_model.parameters())


@pytest.mark.parametrize("fault", [False, True])
def test_an_attack_leaves_the_model_as_it_was(make_trainer, batch, monkeypatch, fault):
    trainer = make_trainer(trainable="vision")
    modules, weights = list(trainer.model.modules()), list(trainer.model.parameters())
    flags = [p.requires_grad for p in weights]
    seen = []
    attack = step_module.maximise

    def watched(objective, *args, **kwargs):
        seen.append([m.training for m in modules])
        result = attack(objective, *args, **kwargs)
        if fault:
            raise OSError("planted")
        seen.append([m.training for m in modules])
        return result

    monkeypatch.setattr(step_module, "maximise", watched)
    rng = torch.get_rng_state()
    if fault:
        with pytest.raises(OSError, match="planted"):
            trainer.training_step(trainer.model, batch)
    else:
        trainer.training_step(trainer.model, batch)
    assert all(all(modes) for modes in seen) and seen
    assert all(m.training for m in modules)
    assert [p.requires_grad for p in weights] == flags and not all(flags)
    assert torch.equal(torch.get_rng_state(), rng)


def spy_on_eps(monkeypatch):
    seen, attack = [], step_module.maximise
    monkeypatch.setattr(
        step_module,
        "maximise",
        lambda o, c, threat, *a, **k: seen.append(threat.eps) or attack(o, c, threat, *a, **k),
    )
    return seen


def test_eps_rises_over_the_warm_up(make_trainer, monkeypatch):
    seen = spy_on_eps(monkeypatch)
    make_trainer(eps=0.1, eps_warmup=0.5, max_steps=8, save_strategy="no").train()
    assert seen == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_eps_is_whole_from_the_first_step_without_a_warm_up(make_trainer, monkeypatch):
    seen = spy_on_eps(monkeypatch)
    make_trainer(eps=0.1, max_steps=2, save_strategy="no").train()
    assert seen == pytest.approx([0.1, 0.1])


def test_random_starts_differ_from_step_to_step_and_by_seed(make_trainer, monkeypatch):
    seen, attack = [], step_module.maximise
    monkeypatch.setattr(step_module, "maximise", lambda *a, **k: seen.append(k["seed"]) or attack(*a, **k))
    for seed in (0, 1):
        make_trainer(max_steps=3, save_strategy="no", seed=seed).train()
    assert len(set(seen)) == 6


def test_a_diverging_loss_stops_training(make_trainer, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data.fill_(float("nan"))

    trainer = make_trainer(callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 2: \{'loss_clean': nan"):
        trainer.train()
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-2"


def test_a_gradient_that_is_not_finite_reaches_no_weight(make_trainer):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.register_hook(lambda g: g * float("nan"))

    trainer = make_trainer(callbacks=[Poison()])
    before = parameters(trainer)
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 0"):
        trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in parameters(trainer).items())


def test_images_with_nan_are_refused(make_trainer, batch):
    trainer = make_trainer()
    batch["pixel_values"][2, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="image 2 of the batch holds NaN"):
        trainer.training_step(trainer.model, batch)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"fp16": True}, "fp16 is not supported"),
        ({"eps": 8.0}, "did you mean 8/255"),
        ({"norm": "l1"}, "norm is 'l1'"),
        ({"inner": "pdg"}, "inner is 'pdg'; expected one of pgd, bridge, fgsm, none"),
        ({"inner_steps": 0, "inner": "pgd"}, "inner_steps is 0"),
        ({"inner_step_size": 0.0}, "inner_step_size is 0.0"),
        ({"inner_steps": 3, "refreshes": 4}, "refreshes is 4; expected 0 to 3"),
        ({"lam": 1.5}, "lam is 1.5"),
        ({"eps_warmup": 1.0}, "eps_warmup is 1.0"),
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"trainable": "text"}, "trainable is 'text'"),
    ],
)
def test_bad_settings(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MBATConfig(output_dir=str(tmp_path), report_to="none", **wrong)


def test_a_trainer_needs_its_parts(tiny_model, tiny_processor, tmp_path):
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match="args is a NoneType"):
        MBATTrainer(tiny_model, processing_class=tiny_processor)
    with pytest.raises(ValueError, match="processing_class is None"):
        MBATTrainer(tiny_model, args)
    with pytest.raises(ValueError, match="model is None"):
        MBATTrainer(None, args, processing_class=tiny_processor)


def test_new_heads_depend_on_the_seed_alone(make_tiny, tmp_path):
    def heads(seed):
        model, processor = make_tiny()
        args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, seed=seed)
        return MBATTrainer(model, args, processing_class=processor).heads.image_out.weight

    first = heads(1)
    torch.rand(3)
    assert torch.equal(heads(1), first)
    assert not torch.equal(heads(2), first)


def test_evaluation_during_training_works_as_in_trainer(make_trainer, data):
    trainer = make_trainer(max_steps=1, save_strategy="no", eval_dataset=torch.utils.data.Subset(data, range(6)))
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


class Interrupt(TrainerCallback):
    def __init__(self, at, error):
        self.at, self.error = at, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise self.error


def test_checkpoints_hold_all_that_training_needs(make_trainer, tmp_path):
    trainer = make_trainer(tau_train=1.0, gradient_accumulation_steps=2)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-4"
    assert last_checkpoint(tmp_path / "out") == folder
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("pytorch_model*"))
    heads, threshold = ConsistencyHeads.from_pretrained(folder / "cmcv")
    assert threshold is None
    for name, value in trainer.heads.state_dict().items():
        assert torch.equal(heads.state_dict()[name], value)
    state = json.loads((folder / "mbat.json").read_text())
    assert state["arm"] == trainer.schedule.state_dict() and state["arm"]["clean_count"] == 4
    assert Passes(**state["passes"]) == trainer.passes


def test_incomplete_checkpoints_are_not_resumed(make_trainer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    trainer = make_trainer()
    save = ConsistencyHeads.save_pretrained

    def full_disk(self, folder, threshold=None):
        if "checkpoint-4" in str(folder):
            raise OSError(28, "No space left on device")
        save(self, folder, threshold)

    monkeypatch.setattr(ConsistencyHeads, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert (out / "checkpoint-4" / "model.safetensors").is_file()
    assert last_checkpoint(out) == out / "checkpoint-2"
    with pytest.raises(ValueError, match=r"checkpoint-4 has no file 'complete'"):
        make_trainer().train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_an_old_mark_does_not_complete_a_new_checkpoint(make_trainer, tmp_path, monkeypatch):
    make_trainer(max_steps=2).train()
    again = make_trainer(max_steps=2)
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        again.train()
    assert last_checkpoint(tmp_path / "out") is None


def test_the_old_checkpoint_goes_when_the_new_one_is_whole(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(save_total_limit=1)  # at steps 2 and 4
    flush = checkpoints._flush

    def full_disk(path):
        if "checkpoint-4" in str(path):
            raise OSError("no space left on device")
        flush(path)

    monkeypatch.setattr(checkpoints, "_flush", full_disk)
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    assert trainer.args.save_total_limit == 1
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-2"
    monkeypatch.undo()
    make_trainer(save_total_limit=1).train()
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_newest_checkpoint_is_newest_by_number(tmp_path):
    for step in (90, 100, 110):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 110:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize(
    "accumulation, muon, error",
    [(1, False, KeyboardInterrupt()), (2, False, RuntimeError("planted")), (1, True, SystemExit())],
)
def test_a_resumed_run_ends_as_one_never_interrupted(make_trainer, tmp_path, accumulation, muon, error):
    config = {
        "gradient_accumulation_steps": accumulation, "muon": muon, "max_steps": 8, "save_steps": 3, "tau_train": 1.0,
        "eps_warmup": 0.6, "refreshes": 1, "lr_scheduler_type": "cosine", "save_total_limit": 2,
    }  # fmt: skip
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **config)
    whole.train()
    with pytest.raises(type(error)):
        make_trainer(callbacks=[Interrupt(5, error)], **config).train()
    torch.manual_seed(12345)  # nothing may rest on what the process did before
    resumed = make_trainer(**config)
    last = last_checkpoint(tmp_path / "out")
    assert last.name == "checkpoint-3"
    begin = parameters(resumed)
    resumed.train(resume_from_checkpoint=str(last))
    expected = parameters(whole)
    for name, value in parameters(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(begin[k], v) for k, v in expected.items())
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()
    assert resumed.passes == whole.passes
    ends = [t.state.log_history[-2]["loss"] for t in (resumed, whole)]
    assert ends[0] == ends[1]


def test_muon_steps_what_is_trained_and_the_heads_keep_their_rate(make_trainer):
    trainer = make_trainer(muon=True, trainable="vision", weight_decay=0.1, heads_learning_rate=0.02)
    begin = parameters(trainer)
    trainer.train()
    groups = trainer.optimizer.optimizer.param_groups
    assert [(g["muon"], g["initial_lr"], g["weight_decay"]) for g in groups] == [
        (True, 0.01, 0.1), (False, 0.01, 0.1), (False, 0.01, 0.0)
    ]  # fmt: skip
    trained = {p: name for name, p in trainer.model.named_parameters() if p.requires_grad}
    in_groups = [p for g in groups for p in g["params"]]
    assert len(in_groups) == len(set(in_groups)) and set(in_groups) == set(trained)
    assert all(p.ndim == 1 or "embed" in trained[p] for p in groups[2]["params"])  # Trainer's rule: norms and biases
    (heads,) = trainer._heads_optimizer.param_groups
    assert set(heads["params"]) == set(trainer.heads.parameters()) and heads["weight_decay"] == 0.0
    assert 0 < heads["lr"] <= 0.02  # by the linear schedule
    moved = {name for name, value in parameters(trainer).items() if not torch.equal(value, begin[name])}
    assert len(moved) > 20 and any(name.startswith("heads.") for name in moved)
    assert {name for name in moved if name.startswith("model.")} <= {f"model.{name}" for name in trained.values()}


def test_muon_beside_another_optimizer_is_refused(make_tiny):
    model, processor = make_tiny()
    other = torch.optim.SGD(model.parameters(), 0.1)
    for given in ({"optimizers": (other, None)}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}):
        with pytest.raises(ValueError, match="muon is set and an optimizer is given"):
            MBATTrainer(model, MBATConfig(output_dir="x", muon=True), processing_class=processor, **given)


def test_the_attack_and_the_contrastive_loss_read_the_right_answers(make_trainer, batch, monkeypatch):
    trainer = make_trainer(beta=0.3)
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    expected = trainer.bridge.encode_text(**text)
    wrong = trainer.bridge.encode_text(**{k: batch[f"negative_{k}"].flatten(0, 1) for k in text})
    seen, contrast = [], trainer._contrast

    def spy_victim(*args):
        victim = Victim(*args)
        seen.append(victim.text_features)
        return victim

    def spy_contrast(parts, text):
        seen.extend((parts[0].own, parts[0].wrong))
        return contrast(parts, text)

    monkeypatch.setattr(consistency, "Victim", spy_victim)
    monkeypatch.setattr(trainer, "_contrast", spy_contrast)
    trainer.training_step(trainer.model, batch)
    for got, right in zip(seen, (expected, expected, wrong), strict=True):
        torch.testing.assert_close(got, right)
    assert not torch.allclose(expected, wrong)


def test_weights_of_another_model_are_refused(make_trainer, tmp_path):
    """Trainer's own loading warns of names it does not find, and goes on."""
    make_trainer(max_steps=2).train()
    folder = tmp_path / "out" / "checkpoint-2"
    weights = load_file(folder / "model.safetensors")
    name = next(k for k in weights if "multi_modal_projector" in k)
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the model.*multi_modal_projector"):
        make_trainer().train(resume_from_checkpoint=str(folder))


def test_the_best_model_is_loaded_at_the_end(make_trainer, data):
    trainer = make_trainer(
        max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        lr_scheduler_type="constant", eval_dataset=torch.utils.data.Subset(data, range(6)),
    )  # fmt: skip
    losses, at = [0.5, 0.1, 0.9], []

    def evaluate(*args, **kwargs):
        at.append(parameters(trainer))
        metrics = {"eval_loss": losses[len(at) - 1]}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate
    trainer.train()
    best = parameters(trainer)
    assert all(torch.equal(best[k], v) for k, v in at[1].items())
    assert not all(torch.equal(best[k], v) for k, v in at[2].items())


def test_weights_that_are_not_safetensors_are_refused(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    folder = tmp_path / "pickled" / "checkpoint-2"
    shutil.copytree(tmp_path / "out" / "checkpoint-2", folder)
    torch.save(trainer.model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        make_trainer().train(resume_from_checkpoint=str(folder))


def test_a_bridge_of_other_heads_is_refused(make_trainer, tmp_path):
    make_trainer(max_steps=2).train()
    other = make_trainer(heads=ConsistencyHeads(64, 64, dim=4, hidden=16))
    with pytest.raises((ValueError, RuntimeError), match="size mismatch"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_mixed_precision_reaches_both_sides(make_trainer, batch):
    trainer = make_trainer(bf16=True, gamma=0.0)
    seen = {}
    sides = {"vision": trainer.model.model.vision_tower, "language": trainer.model.model.language_model}
    for side, part in sides.items():
        layer = part.get_submodule("encoder.layers.0" if side == "vision" else "layers.0").mlp
        layer.register_forward_hook(lambda *a, side=side: seen.setdefault(side, set()).add(a[2].dtype))
    loss = trainer.training_step(trainer.model, batch)
    assert seen == {"vision": {torch.bfloat16}, "language": {torch.bfloat16}}
    plain = make_trainer(gamma=0.0).training_step(make_trainer(gamma=0.0).model, batch)
    assert loss != plain and loss == pytest.approx(float(plain), rel=0.05)
    assert all(
        p.dtype == torch.float32 and p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None
    )


@pytest.mark.parametrize(
    "theirs",
    # Two names of one option; transformers has the second from 5.23 on.
    [n for n in ("gradient_checkpointing", "activation_checkpointing") if n in MBATConfig.__dataclass_fields__],
)
def test_two_kinds_of_recomputation_are_refused(theirs, tmp_path):
    with pytest.raises(ValueError, match=f"recompute is 'selective' and {theirs} is set"):
        MBATConfig(output_dir=str(tmp_path), recompute="selective", **{theirs: True})


@pytest.mark.parametrize("theirs", [None, True, False])
@pytest.mark.parametrize("recompute", ["none", "encoder", "selective", "full"])
def test_recomputation_changes_no_gradient(recompute, theirs, make_trainer, batch):
    """Also of a model that recomputes already, `theirs` saying whether by the reentrant kind."""
    plain = make_trainer()
    plain.training_step(plain.model, dict(batch))
    trainer = make_trainer()
    if theirs is not None:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": theirs})
    trainer = make_trainer(recompute=recompute, model=trainer.model)
    trainer.training_step(trainer.model, dict(batch))
    for (name, a), b in zip(plain.model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-9, atol=1e-9)


def test_a_step_is_the_same_with_logits_in_chunks(make_trainer, batch, monkeypatch):
    steps, calls = [], []

    def watched(*args):
        calls.append(args)
        return token_losses(*args)

    monkeypatch.setattr(output_layer, "token_losses", watched)
    for large in (False, True):
        monkeypatch.setattr(OutputLayer, "_pays", lambda *_, large=large: large)
        trainer = make_trainer(refreshes=1)
        loss = trainer.training_step(trainer.model, dict(batch))
        steps.append((loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}))
        assert len(calls) == (3 if large else 0)  # the clean branch, a refresh of the attack, the adversarial branch
    (loss, grads), (other, others) = steps
    torch.testing.assert_close(loss, other)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-3, atol=1e-5, msg=name)
