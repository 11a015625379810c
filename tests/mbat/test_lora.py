"""Adapters of PEFT on any part of the model: what learns, what is saved, and what a resumed run finds again."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback

from cmai_fast import Guard
from cmai_fast.attacks import Victim
from cmai_fast.bridge import bridge_of
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import VQACollator
from cmai_fast.mbat import MBATConfig, MBATTrainer, last_checkpoint, quantized_language_model
from cmai_fast.mbat.muon import hidden_matrices
from families import FAMILIES

WAYS = pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
PARTS = {
    "vision": r".*vision_tower.*\.(q_proj|fc1)",
    "projector": r".*multi_modal_projector\.linear_.",
    "language": r".*language_model.*\.(q_proj|down_proj)",
    "all": "all-linear",
}
PLAIN = {
    "inner_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2,
    "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_randomness():
    with torch.random.fork_rng():  # adapters are drawn from the global generator
        yield


@pytest.fixture
def load(folder):
    """`load(quantization=None)`: the tiny model, from its folder, so that adapters know where their base is."""
    return lambda quantization=None: AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu" if quantization else None
    )


def adapt(model: Any, way: str, part: str = "all", name: str = "default", **config: Any) -> Any:
    """The model with LoRA that is not the identity, by one of the two ways."""
    config = LoraConfig(**{"r": 2, "target_modules": PARTS[part], "init_lora_weights": False, **config})
    if way == "get_peft_model":
        return get_peft_model(model, config, adapter_name=name)
    model.add_adapter(config, name)
    return model


@pytest.fixture
def train(data, tiny_processor, tmp_path):
    """`train(model, callbacks=None, **config)`: a trainer, on which nothing has been called."""

    def train(model: Any, callbacks: Any = None, **config: Any) -> MBATTrainer:
        bridge = bridge_of(model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            heads = ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)
        return MBATTrainer(
            model,
            MBATConfig(**{"output_dir": str(tmp_path / "out"), **PLAIN, **config}),
            heads=heads,
            train_dataset=data,
            data_collator=VQACollator(tiny_processor, negatives=1),
            processing_class=tiny_processor,
            callbacks=callbacks,
        )

    return train


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {k: v for k, v in batch.items() if k in ("pixel_values", "input_ids", "attention_mask")}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def check_formula(trainer: MBATTrainer, batch: dict[str, torch.Tensor], lam: float) -> set[str]:
    """One step against a plain backward of the loss; returns the names of what got a gradient."""
    found, attack = [], trainer._attack
    trainer._attack = lambda *args: found.append(attack(*args)) or found[-1]
    twin = copy.deepcopy(trainer.model).train()
    total = trainer.training_step(trainer.model, batch)
    objective = Victim(bridge_of(twin), trainer.space, batch)
    clean, adv = objective.pixels(), found[0].adv
    assert (adv - clean).abs().max() > 1 / 255
    # The mean over answer tokens; the first label of a model that reads its prompt is not predicted, and a dual encoder
    # has one label per sample.
    labels = batch["labels"]
    labels = labels[:, None] if labels.dim() == 1 else labels[:, int("input_ids" in batch) :]
    counts = (labels != -100).sum(1)
    parts = [(counts * objective(trainer.space.to_model(x)).loss).sum() / counts.sum() for x in (clean, adv)]
    loss = (1 - lam) * parts[0] + lam * parts[1]
    torch.testing.assert_close(total, loss.detach(), rtol=1e-4, atol=1e-5)
    loss.backward()
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert set(got) == set(expected) and got
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5 * float(1 + grad.abs().max()), msg=name)
        assert grad.any(), name
    return set(got)


@WAYS
@pytest.mark.parametrize("part", PARTS)
def test_gradients_are_those_of_the_formula(load, train, batch, way, part):
    trainer = train(adapt(load(), way, part), lam=0.4, gamma=0.0, beta=0.2)
    learned = check_formula(trainer, batch, 0.4)
    assert all(".lora_" in name for name in learned)
    sides = {side for side in ("vision_tower", "projector", "language_model") if any(side in n for n in learned)}
    assert sides == {"vision": {"vision_tower"}, "projector": {"projector"}, "language": {"language_model"}}.get(
        part, {"vision_tower", "projector", "language_model"}
    )


@WAYS
def test_the_attack_asks_no_parameter_for_a_gradient(load, train, batch, way):
    trainer = train(adapt(load(), way))
    seen, attack = [], trainer._attack
    layers = [m for m in trainer.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]

    def look(layer, *_):
        seen.append(layer.training or any(p.requires_grad for p in layer.parameters()))

    def watched(*args):
        hooks = [layer.register_forward_hook(look) for layer in layers]
        try:
            return attack(*args)
        finally:
            for hook in hooks:
                hook.remove()

    trainer._attack = watched
    flags = [p.requires_grad for p in trainer.model.parameters()]
    trainer.training_step(trainer.model, batch)
    assert seen and not any(seen)
    assert [p.requires_grad for p in trainer.model.parameters()] == flags and any(flags)
    assert all(m.training for m in trainer.model.modules())


@WAYS
def test_what_is_saved_is_loaded_by_peft_and_transformers(load, train, batch, tmp_path, folder, way):
    model = adapt(load(), way, "language", modules_to_save=["multi_modal_projector"])
    trainer = train(model, save_strategy="no")
    before = values(model)
    trainer.train()
    changed = moved(model, before)
    assert changed and all(".lora_" in n or "projector.modules_to_save." in n for n in changed)
    assert any("projector.modules_to_save." in n for n in changed) and any("language_model" in n for n in changed)
    out = tmp_path / "saved"
    trainer.save_model(str(out))
    assert {"adapter_config.json", "adapter_model.safetensors", "cmcv"} <= {p.name for p in out.iterdir()}
    assert not (out / "model.safetensors").exists()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(load(), batch), atol=1e-3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), out), batch), expected)
    grown = load()
    grown.load_adapter(str(out))
    torch.testing.assert_close(logits(grown, batch), expected)
    torch.testing.assert_close(logits(AutoModelForImageTextToText.from_pretrained(out), batch), expected)
    torch.testing.assert_close(logits(Guard.from_pretrained(out, threshold=0.0).pipeline.model, batch), expected)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "way, name, accumulation, muon", [("add_adapter", "mine", 2, False), ("get_peft_model", "default", 1, True)]
)
def test_a_resumed_run_ends_as_one_never_interrupted(load, train, tmp_path, way, name, accumulation, muon):
    config = {
        "gradient_accumulation_steps": accumulation, "muon": muon, "max_steps": 7, "save_steps": 3, "tau_train": 1.0,
        "eps_warmup": 0.6, "lr_scheduler_type": "cosine",
    }  # fmt: skip

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return adapt(load(), way, name=name, lora_dropout=0.2, modules_to_save=["multi_modal_projector"])

    whole = train(model(1), output_dir=str(tmp_path / "whole"), **config)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        train(model(1), [Interrupt()], **config).train()
    resumed = train(model(2), **config)  # adapters of other values: all must come from the checkpoint
    last = last_checkpoint(tmp_path / "out")
    assert last.name == "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(last))
    expected = values(whole.model)
    assert moved(resumed.model, expected) == set()
    assert moved(whole.model, values(model(1))) == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert resumed.passes == whole.passes and resumed.schedule.state_dict() == whole.schedule.state_dict()


@WAYS
def test_vision_alone_trains_the_adapters_of_the_vision_side_alone(load, train, way):
    trainer = train(adapt(load(), way), trainable="vision", save_strategy="no")
    before = values(trainer.model)
    trainer.train()
    changed = moved(trainer.model, before)
    assert changed == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {".lora_" in n for n in changed} == {True}
    assert any("vision_tower" in n for n in changed) and any("projector" in n for n in changed)
    assert not any("language_model" in n for n in changed)
    with pytest.raises(ValueError, match="there is nothing to train"):
        train(adapt(load(), way, "language"), trainable="vision")


@WAYS
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_beside_a_quantised_language_model(load, train, folder, tmp_path, way, bits):
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        quantised = load(quantized_language_model(folder, bits, torch.float32))
        return adapt(quantised, way, "language", modules_to_save=["multi_modal_projector"])

    whole = train(model(1))
    before = values(whole.model)
    whole.train()
    changed = moved(whole.model, before)
    assert changed and all(".lora_" in n or "projector.modules_to_save." in n for n in changed)
    assert any("language_model" in n for n in changed) and any("projector" in n for n in changed)
    assert all(p.grad is None for p in whole.model.parameters() if not p.requires_grad)
    rest = train(model(2))
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert moved(rest.model, values(whole.model)) == set()


@WAYS
def test_all_of_a_model_may_be_quantised_under_adapters(load, train, batch, way):
    model = adapt(load(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)), way)
    trainer = train(model, save_strategy="no", gamma=0.0, lam=0.4)
    assert not trainer.bridge.vision_side[0].encoder.layers[0].mlp.fc1.base_layer.weight.is_floating_point()
    learned = check_formula(trainer, batch, 0.4)
    assert any("vision_tower" in n for n in learned) and any("language_model" in n for n in learned)


@WAYS
def test_what_the_adapters_file_would_not_hold_is_refused(load, train, tmp_path, way):
    trainer = train(adapt(load(), way, "language"))
    trainer.bridge.model.model.multi_modal_projector.requires_grad_(True)
    lost = r"4 trainable parameters are not part of the saved adapter .*multi_modal_projector.*modules_to_save"
    with pytest.raises(ValueError, match=lost):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match=lost):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists() and not list((tmp_path / "out").glob("checkpoint-*"))


@WAYS
def test_adapters_and_a_model_from_before_are_not_mixed(load, train, batch, tmp_path, way):
    """`from_pretrained` takes the model beside adapters for theirs, and puts adapters beside a model into it."""
    whole, lora = train(load(), save_strategy="no"), train(adapt(load(), way), save_strategy="no")
    folders = [tmp_path / name for name in ("of a model", "of adapters")]
    for trainer, folder in zip((whole, lora), folders, strict=True):
        for _ in range(2):  # the same again is no mixture
            trainer.save_model(str(folder))
    for trainer, folder, message in (
        (lora, folders[0], "of a model holds a whole model, which from_pretrained would take"),
        (whole, folders[1], "of adapters holds adapters, which from_pretrained would put into"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.save_model(str(folder))
        trainer.args.output_dir = str(folder)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
    based = train(adapt(AutoModelForImageTextToText.from_pretrained(folders[0]), way))
    based.save_model(str(folders[0]))
    torch.testing.assert_close(
        logits(AutoModelForImageTextToText.from_pretrained(folders[0]), batch), logits(based.model, batch)
    )


def test_of_two_active_adapters_transformers_would_save_one(load, train):
    model = adapt(adapt(load(), "add_adapter", "vision"), "add_adapter", "language", "second")
    model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"4 trainable parameters are not part of the saved adapter .*lora_A\.second"):
        train(model).train()


_PROMPT = {
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 2,
    "num_layers": 1,
    "num_attention_heads": 4,
    "token_dim": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(**_PROMPT),
        peft.PrefixTuningConfig(**_PROMPT),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_method_that_changes_the_whole_forward_pass_is_refused(load, config):
    model = get_peft_model(load(), copy.deepcopy(config))
    with pytest.raises(ValueError, match=rf"'default' is of type {config.peft_type.value} .*LoraConfig"):
        bridge_of(model)


@WAYS
def test_muon_steps_whole_layers_and_leaves_low_rank_matrices_to_adamw(load, train, way):
    trainer = train(adapt(load(), way, modules_to_save=["multi_modal_projector"]), muon=True)
    optimizer = trainer.create_optimizer()
    names = {p: name for name, p in trainer.model.named_parameters()}
    by_muon = {names[p] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    by_adamw = {names[p] for group in optimizer.param_groups if not group["muon"] for p in group["params"]}
    assert {name.split(".projector")[0].rsplit(".", 2)[1] for name in by_muon} == {"linear_1", "linear_2"}
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == by_muon | by_adamw
    assert any(".lora_A." in n for n in by_adamw) and any(".lora_B." in n for n in by_adamw)


@WAYS
def test_a_whole_output_layer_is_no_hidden_matrix(load, way):
    model = adapt(load(), way, "language", modules_to_save=["lm_head", "embed_tokens", "multi_modal_projector"])
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p] for p in hidden_matrices(model)}
    assert any("projector.modules_to_save" in name for name in found)
    assert not any("lm_head" in name or "embed" in name for name in found)


@WAYS
def test_weights_of_another_kind_are_refused(load, train, tmp_path, way):
    last = str(tmp_path / "out" / "checkpoint-2")
    train(adapt(load(), way, "language"), max_steps=2).train()
    with pytest.raises(ValueError, match=r"do not fit those of the model: 4 tensors are .*another shape"):
        train(adapt(load(), way, "language", r=3)).train(resume_from_checkpoint=last)
    with pytest.raises(ValueError, match="do not fit those of the model"):
        train(adapt(load(), way, "vision")).train(resume_from_checkpoint=last)
    with pytest.raises(ValueError, match="holds only adapters, and the model has none"):
        train(load()).train(resume_from_checkpoint=last)
    train(load(), max_steps=2, output_dir=str(tmp_path / "plain")).train()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors does not exist, and the model has adapters"):
        train(adapt(load(), way)).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


@WAYS
@pytest.mark.parametrize("name", ["Qwen2.5-VL", "ViT-GPT2", "CLIP"])
def test_other_families(name, tmp_path, way):
    (family,) = (f for f in FAMILIES if f.name == name)
    batch, bridge = family.batch(family.model(), family.samples()), bridge_of(family.model())
    trainer = MBATTrainer(
        adapt(copy.deepcopy(family.model()), way),
        MBATConfig(output_dir=str(tmp_path / "out"), **{**PLAIN, "lam": 0.4, "gamma": 0.0, "beta": 0.2}),
        processing_class=family.processor,
        heads=ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16),
    )
    learned = check_formula(trainer, batch, 0.4)
    assert all(".lora_" in n for n in learned)
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(copy.deepcopy(family.model()), tmp_path / "saved")
    pair = [family.own_forward(m.eval(), batch)[0] for m in (trainer.bridge.model, again.get_base_model())]
    torch.testing.assert_close(*pair)


@WAYS
def test_adapters_that_were_loaded_frozen_are_refused(load, train, way):
    model = adapt(load(), way, "language", modules_to_save=["multi_modal_projector"])
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_" not in name)
    with pytest.raises(ValueError, match="the model's adapters are frozen, and only other parameters would learn"):
        train(model)
