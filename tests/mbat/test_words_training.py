"""MBAT with the words of the prompt under attack: gradients of the formula, what changes, evaluation, and refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset

from cmai_fast.attacks import Victim, Words
from cmai_fast.bridge import bridge_of, set_recompute
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat.inner import reworded
from cmai_fast.mbat.robust_eval import verdicts
from cmai_fast.threat import ThreatModel, WordBall
from own_answers import answer_itself

PLAIN = {"gamma": 0.0, "beta": 0.0, "arm": False}


def trained(make_trainer, **config):
    """A trainer whose model is right about some samples."""
    trainer = make_trainer(max_steps=40, save_strategy="no", inner="none", learning_rate=3e-3, **PLAIN, **config)
    trainer.train()
    return trainer


@pytest.mark.parametrize("modality", ["text", "both"])
@pytest.mark.parametrize("solver", [{"inner": "bridge"}, {"inner": "bridge", "refreshes": 1}, {"inner": "pgd"}])
def test_gradients_are_those_of_the_formula(make_trainer, batch, monkeypatch, modality, solver):
    """(1 - lam) * L_clean + lam * L(adversarial images, adversarial words), by one plain backward pass."""
    trainer = make_trainer(modality=modality, text_eps=0.5, lam=0.4, **PLAIN, **solver)
    made, attacked = [], []
    monkeypatch.setattr("cmai_fast.mbat.step.Words", lambda *a: made.append(Words(*a)) or made[-1])
    attack = trainer._attack
    trainer._attack = lambda *a: attacked.append(attack(*a)) or attacked[-1]
    model = copy.deepcopy(trainer.model).train()
    total = trainer.training_step(trainer.model, batch)
    (words,), bridge = made, bridge_of(model)
    image, text = bridge.inputs(batch)
    pixels = batch["pixel_values"]
    moved = attacked[0].model_input if modality == "both" else pixels
    assert words.delta.abs().sum() > 0 and (modality == "text" or not torch.equal(moved, pixels))
    counts = (batch["labels"][:, 1:] != -100).sum(1)

    def loss(values, delta):
        embed = model.get_input_embeddings()
        handle = embed.register_forward_hook(lambda m, a, out: out + delta if out.shape == delta.shape else out)
        losses = bridge.losses(bridge.encode_image(values, **image), **text)[0]
        handle.remove()
        return (counts * losses).sum() / counts.sum()

    wanted = 0.6 * loss(pixels, torch.zeros_like(words.delta)) + 0.4 * loss(moved, words.delta)
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-4, atol=1e-5)
    wanted.backward()
    for (name, p), q in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * float(1 + q.grad.abs().max()))


def test_the_attack_on_words_alone_costs_one_pass_of_the_language_side(make_trainer, batch):
    passes = {}
    for modality in ("image", "text", "both"):
        trainer = make_trainer(modality=modality, inner_steps=4, **PLAIN)
        trainer.training_step(trainer.model, batch)
        passes[modality] = trainer.passes
    assert passes["both"] == passes["image"]
    text = passes["text"]
    assert (text.full_forward, text.full_backward, text.vision_forward, text.vision_backward) == (2, 2, 0, 0)


@pytest.mark.parametrize("modality", ["text", "both"])
def test_a_run_with_heads_learns_resumes_and_does_not_depend_on_parts(make_trainer, data, modality):
    whole = make_trainer(modality=modality, gamma=0.5, beta=0.1, save_steps=2)
    whole.train()
    assert ("s_c_adv" in whole.state.log_history[0]) == (modality == "both")
    resumed = make_trainer(modality=modality, gamma=0.5, beta=0.1, save_steps=2)
    resumed.train(resume_from_checkpoint=whole.args.output_dir + "/checkpoint-2")
    parts = make_trainer(modality=modality, gamma=0.5, beta=0.1, save_strategy="no")
    parts._rows_at_once = 2
    parts.train()
    for (name, p), q, r in zip(
        whole.model.named_parameters(), resumed.model.parameters(), parts.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        torch.testing.assert_close(r, p, rtol=2e-2, atol=2e-3)


def test_samples_without_an_image_are_attacked_in_their_words(make_trainer, collate, data):
    batch = collate([data[i] for i in range(4)])
    logs = {}
    for modality in ("image", "both", "text"):
        trainer = make_trainer(modality=modality, text_eps=0.5, **PLAIN)
        own = {k: v for k, v in batch.items() if k != "pixel_values" and not k.startswith("negative")}
        own["input_ids"] = own["input_ids"].masked_fill(
            own["input_ids"] == trainer.bridge.model.config.image_token_id, 3
        )
        parts, _ = trainer._step({**own, "sample_ids": torch.arange(4)}, 4)
        logs[modality] = float(parts["loss_clean"]), float(parts["loss_adv"])
    assert logs["image"][0] == logs["image"][1]
    assert logs["text"][1] > logs["text"][0] and logs["both"] == logs["text"]


@pytest.mark.parametrize("modality", ["text", "both"])
def test_the_evaluation_attacks_what_training_attacks(make_trainer, data, modality):
    trainer = trained(make_trainer, text_eps=0.5, eval_attack_steps=3, eval_dataset=Subset(data, range(10)))
    image = trainer.evaluate()
    trainer.args.modality = modality
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(image["eval_loss"]) and found["eval_accuracy"] > 0
    if modality == "both":
        assert found["eval_robust_loss"] > image["eval_robust_loss"]
        assert found["eval_robust_accuracy"] <= image["eval_robust_accuracy"]
    assert found["eval_robust_loss"] > found["eval_loss"]
    assert found["eval_robust_accuracy"] <= found["eval_accuracy"]


def test_an_attack_on_words_recomputes_as_training_does(make_tiny, batch):
    bridge = bridge_of(make_tiny()[0].eval())
    image, text = bridge.inputs(batch)
    with torch.no_grad():
        features = bridge.encode_image(batch["pixel_values"], **image)
    calls = []
    layer = bridge.text_model.layers[0].self_attn
    handle = layer.register_forward_hook(lambda *a: calls.append(1))
    for recompute, passes in (("none", 1), ("full", 2)):
        set_recompute(bridge.model, bridge.vision_side, recompute)
        calls.clear()
        reworded(Words(bridge, text, WordBall()), features, "pgd", steps=1)
        assert len(calls) == passes
    handle.remove()


@pytest.mark.parametrize("refreshes", [0, 1])
def test_a_loss_of_its_own_costs_one_more_pass(make_trainer, batch, refreshes):
    """With label smoothing the clean branch has no gradient of L_task, as for images."""
    passes = {}
    for smoothing in (0.0, 0.1):
        trainer = make_trainer(
            modality="text", inner_steps=4, refreshes=refreshes, label_smoothing_factor=smoothing, **PLAIN
        )
        trainer.training_step(trainer.model, batch)
        passes[smoothing] = trainer.passes.full_backward
    assert passes == {0.0: 2 + refreshes, 0.1: 3 + refreshes}


def test_the_words_of_a_broken_sample_are_those_that_broke_it(make_tiny):
    """So that the loss of the attack on words compares with that of the attack on both; answers are the model's own."""
    case, found = answer_itself(make_tiny(), 6, torch.float64), {}
    batch = case.batch() | {"pixel_values": case.space.to_model(case.clean)}
    for images in (False, True):
        victim = Victim(bridge_of(case.model), case.space, batch)
        found[images] = verdicts(
            victim, ThreatModel("linf", 0.0), 6, seed=0, sample_ids=case.sample_ids, words=WordBall("l2", 0.003),
            images=images,
        )  # fmt: skip
        assert victim.words is None and found[images]["accuracy"].all()
    both, text = found[True], found[False]
    assert 0 < both["robust_accuracy"].sum() < 6
    assert torch.equal(text["robust_accuracy"], both["robust_accuracy"])
    broken = both["robust_accuracy"] == 0
    torch.testing.assert_close(text["robust_loss"][broken], both["robust_loss"][broken])


def test_without_images_under_attack_their_score_is_the_clean_one(make_trainer, data):
    trainer = make_trainer(modality="text", eval_dataset=Subset(data, range(4)), eval_attack_steps=2)
    found = trainer.evaluate()
    assert found["eval_robust_s_c"] == found["eval_s_c"]


def test_the_model_card_names_the_attack(make_trainer, tmp_path):
    trainer = make_trainer(modality="text", text_eps=0.3, **PLAIN)
    trainer.create_model_card()
    card = next(tmp_path.rglob("README.md")).read_text()
    assert "modality" in card and "text_eps" in card and "0.3" in card


def test_a_sharded_model_is_refused_also_later(make_trainer, monkeypatch):
    trainer = make_trainer(**PLAIN)
    monkeypatch.setattr("cmai_fast.mbat.trainer.shards.is_sharded", lambda model: True)
    trainer.args.modality = "both"
    with pytest.raises(ValueError, match="modality is 'both', which reads the input embeddings"):
        trainer._check_changes()


def test_beta_needs_no_heads_where_no_image_is_attacked(make_tiny, data, tmp_path):
    model, processor = make_tiny()
    config = MBATConfig(
        str(tmp_path), modality="text", gamma=0.0, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    MBATTrainer(model, config, train_dataset=data, processing_class=processor).train()
    with pytest.raises(ValueError, match=r"beta is 0\.1, gamma 0 and heads None"):
        MBATTrainer(model, replace(config, modality="image"), train_dataset=data, processing_class=processor)


def test_bad_settings_are_refused(make_trainer):
    with pytest.raises(ValueError, match="modality is 'audio'; expected one of image, text, both"):
        MBATConfig("out", modality="audio")
    with pytest.raises(ValueError, match="text_eps is -1"):
        MBATConfig("out", text_eps=-1)
    with pytest.raises(ValueError, match="text_norm is 'l0'"):
        MBATConfig("out", text_norm="l0")
    with pytest.raises(ValueError, match="arm is True and modality 'text'"):
        make_trainer(modality="text", arm=True)
    trainer = make_trainer()
    trainer.args.modality = "text"
    trainer.args.arm = True
    with pytest.raises(ValueError, match="arm is True and modality 'text'"):
        trainer.train()
