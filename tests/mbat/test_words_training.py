"""MBAT with the words of the prompt under attack: gradients of the formula, what changes, evaluation, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Subset

from cmai_fast.attacks.words import Words
from cmai_fast.bridge import bridge_of
from cmai_fast.mbat import MBATConfig

PLAIN = {"gamma": 0.0, "beta": 0.0, "arm": False}


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
    trainer = make_trainer(
        max_steps=40, save_strategy="no", inner="none", learning_rate=3e-3, text_eps=0.5, eval_attack_steps=3,
        eval_dataset=Subset(data, range(10)), **PLAIN,
    )  # fmt: skip
    trainer.train()
    image = trainer.evaluate()
    trainer.args.modality = modality
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(image["eval_loss"])
    if modality == "both":
        assert found["eval_robust_loss"] > image["eval_robust_loss"]
        assert found["eval_robust_accuracy"] <= image["eval_robust_accuracy"]
    assert found["eval_robust_loss"] > found["eval_loss"]
    assert found["eval_robust_accuracy"] <= found["eval_accuracy"]


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
