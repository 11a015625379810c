"""Two processes with half of the batch each train as one with all of it does, with a copy of the model each or with
its shards."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cmai_fast.bridge import DualBridge
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.mbat import ranks
from cmai_fast.mbat.adapters import WEIGHTS
from cmai_fast.mbat.refused import check_sharding
from launcher import Launcher, Train, assert_same, trains

# A step of plain SGD shows every gradient as it is; adaptive steps would hide a wrong scale.
SETTINGS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.5,
    "inner_steps": 2, "refreshes": 1, "beta": 0.2, "gamma": 0.5, "tau_train": 0.9, "logging_steps": 1,
    "save_steps": 2, "lr_scheduler_type": "constant", "weight_decay": 0.01,
    # Ten samples: the last batch of two processes is filled up with samples that must not count.
    "eval_strategy": "steps", "eval_steps": 2, "eval_attack_steps": 2, "per_device_eval_batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for part in make_tiny():
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def train(folder: Path, launcher: Launcher) -> Train:
    return trains(launcher, folder, SETTINGS)


def assert_same_evaluations(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["evaluations"]
    names = ("loss", "accuracy", "s_c", "robust_loss", "robust_accuracy", "robust_s_c")
    for mine, whole in zip(two["evaluations"], one["evaluations"], strict=True):
        for name in names:
            assert mine[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-6), name


def assert_attacked(said: dict[str, Any]) -> None:
    """Some answers were right to begin with, and the attack changed something."""
    last = said["evaluations"][-1]
    assert 0 < last["eval_accuracy"] < 1 and last["eval_robust_loss"] > last["eval_loss"]


def test_unequal_parts_of_a_batch_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks.dist, "get_backend", lambda: "gloo")
    for there, message in ((3, None), (2, "2 samples in one process and 3 in another, 3 in this one.*even_batches")):

        def all_reduce(extremes: torch.Tensor, _: Any, there: int = there) -> None:
            extremes.copy_(torch.maximum(extremes, torch.tensor([there, -there])))

        monkeypatch.setattr(ranks.dist, "all_reduce", all_reduce)
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            ranks.check_equal(3)


def test_two_processes_share_a_stream_whose_texts_differ_in_length(train: Train) -> None:
    changes = {"stream": True, "eval_strategy": "no", "save_strategy": "no", "max_steps": 2}
    assert_same(train("one-stream", 1, **changes)[0], train("two-stream", 2, **changes)[0])


MUON = {"gradient_accumulation_steps": 2, "inner": "pgd", "muon": True, "learning_rate": 0.02}


@pytest.mark.parametrize("changes", [{}, MUON])
def test_two_processes_train_as_one_with_the_whole_batch(make_tiny, train: Train, changes: dict[str, Any]) -> None:
    tag = "-".join(map(str, changes.values()))
    one, one_said = train(f"one{tag}", 1, **changes)
    two, two_said = train(f"two{tag}", 2, **changes)
    start = {f"model.{k}": v.detach().double() for k, v in make_tiny()[0].named_parameters()}
    parts = ("language_model", "vision_tower", "multi_modal_projector")
    assert all(any(part in k and not torch.equal(v, one[k]) for k, v in start.items()) for part in parts)
    assert_same(one, two)
    assert two_said["arm"] == pytest.approx(one_said["arm"])
    for mine, whole in zip(two_said["logs"], one_said["logs"], strict=True):
        for key in ("loss_clean", "loss_adv", "loss_contrastive", "s_c_adv"):
            assert mine[key] == pytest.approx(whole[key], rel=1e-5), key
    assert_same_evaluations(one_said, two_said)
    if changes:
        assert_attacked(two_said)


# Long enough for ARM to act.
RISING = {
    "max_steps": 12, "gradient_accumulation_steps": 2, "eps_max": 0.06, "lam_max": 0.9, "learning_rate": 0.01,
    "eval_strategy": "no", "save_strategy": "no",
}  # fmt: skip


def test_two_processes_and_micro_batches_move_the_same_settings(train: Train) -> None:
    _, one_said = train("one-rising", 1, **RISING)
    _, two_said = train("two-rising", 2, **RISING)
    assert one_said["arm"]["level"] > 0 and one_said["arm"]["clean_count"] == 12
    assert two_said["arm"] == pytest.approx(one_said["arm"])
    for mine, whole in zip(two_said["logs"], one_said["logs"], strict=True):
        for key in ("beta", "eps", "lam", "arm_level", "arm_mean", "arm_variance", "tau_train"):
            assert mine[key] == pytest.approx(whole[key], rel=1e-5), key
    assert [entry["lam"] for entry in two_said["logs"]][-2:] == pytest.approx([0.52, 0.54])


TEXTS = {
    "texts": True, "gamma": 0.0, "beta": 0.0, "arm": False, "max_steps": 2, "eval_strategy": "no",
    "save_strategy": "no",
}  # fmt: skip


def test_processes_with_unequally_many_images_train_as_one(train: Train) -> None:
    one, one_said = train("one-texts", 1, **TEXTS)
    two, two_said = train("two-texts", 2, **TEXTS)
    assert_same(one, two)
    for mine, whole in zip(two_said["logs"], one_said["logs"], strict=True):
        assert mine["loss_clean"] == pytest.approx(whole["loss_clean"], rel=1e-5)


@pytest.mark.parametrize("side", ["_language_side", "_vision_side"])
def test_memory_that_runs_out_in_one_process_makes_parts_in_both(train: Train, side: str) -> None:
    """None waits for the other, and the step stays that of the whole batch, negatives included."""
    one, one_said = train("one", 1)
    two, two_said = train(f"two-scarce{side}", 2, scarce=[side, 2])
    assert_same(one, two)
    assert two_said["arm"] == pytest.approx(one_said["arm"])


def test_two_processes_resume_to_the_same_weights(folder: Path, train: Train) -> None:
    whole, _ = train("two", 2)
    rest, _ = train("rest", 2, resume_from_checkpoint=str(folder / "two" / "checkpoint-2"))
    assert all(torch.equal(rest[name], weight) for name, weight in whole.items())


# Samples of a process are fooled before those of the other, which go on; adaptive steps follow the schedule.
ADAPTIVE = {
    "max_steps": 4, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01,
    "lr_scheduler_type": "linear", "lam": 0.1, "eps": 0.5, "eval_steps": 4, "eval_attack_steps": 5, "save_steps": 2,
    "eval_strategy": "steps", "per_device_eval_batch_size": 2,
}  # fmt: skip


# No weight gets a gradient before the attack, so those of the first micro-batch are still to be reduced in it.
ADVERSARIAL = {"lam": 1.0, "inner": "pgd", "gradient_accumulation_steps": 2, "eval_strategy": "no"}
# The last pass of the language model in a step is one without a gradient (E_t), which leaves parameters gathered.
LANGUAGE = {"freeze": ["vision_tower", "multi_modal_projector"], "inner": "none", "eval_strategy": "no"}
# Nothing but L_task gives the clean images a gradient, which the attack must not touch.
ALONE = {"gamma": 0.0, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}


@pytest.mark.parametrize(
    "tag, changes",
    [("-adaptive", ADAPTIVE), ("-adversarial", ADVERSARIAL), ("-language", LANGUAGE), ("-alone", ALONE)],
)
def test_shards_train_as_one_process_with_the_whole_model(train: Train, tag: str, changes: dict[str, Any]) -> None:
    one, one_said = train(f"one{tag}", 1, **changes)
    two, two_said = train(f"shards{tag}", 2, fsdp=True, **changes)
    assert_same(one, two)
    assert two_said["arm"] == pytest.approx(one_said["arm"])
    assert two_said["counts"]["reduce_scatter outside"] > 0
    assert ("trainable projector outside" in two_said["counts"]) == ("freeze" not in changes)
    assert not any(what.endswith("in attacks") for what in two_said["counts"])
    if changes["eval_strategy"] != "no":
        assert_same_evaluations(one_said, two_said)
        assert_attacked(two_said)


def test_shards_are_saved_whole_and_resume_to_the_same_weights(folder: Path, train: Train) -> None:
    whole, _ = train("shards-adaptive", 2, fsdp=True, **ADAPTIVE)
    saved = folder / "shards-adaptive" / "checkpoint-4"
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert type(model).__name__ == model.config.architectures[0] == "LlavaForConditionalGeneration"
    for name, weight in model.named_parameters():
        assert torch.equal(weight, whole[f"model.{name}"]), name
    heads, _ = ConsistencyHeads.from_pretrained(saved / "cmcv")
    assert all(torch.equal(p, whole[f"heads.{name}"]) for name, p in heads.named_parameters())
    assert not list(saved.glob("pytorch_model*"))
    before = str(folder / "shards-adaptive" / "checkpoint-2")
    rest, _ = train("rest-of-shards", 2, fsdp=True, **ADAPTIVE, resume_from_checkpoint=before)
    assert all(torch.equal(rest[name], weight) for name, weight in whole.items())


def test_adapters_in_a_sharded_model_train_and_resume_as_in_one_process(folder: Path, train: Train) -> None:
    changes = ADAPTIVE | {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", "adapters": True}
    one, _ = train("one-adapters", 1, **changes)
    two, _ = train("shards-adapters", 2, fsdp=True, **changes)
    assert_same(one, two)
    before = str(folder / "shards-adapters" / "checkpoint-2")
    rest, _ = train("rest-of-adapters", 2, fsdp=True, **changes, resume_from_checkpoint=before)
    assert all(torch.equal(rest[name], weight) for name, weight in two.items())
    saved = load_file(folder / "shards-adapters" / "checkpoint-4" / WEIGHTS)
    learnt = {k: v for k, v in one.items() if "lora_" in k}
    assert learnt
    for name, weight in learnt.items():
        key = name.replace("model.", "base_model.model.", 1).replace(".default", "")
        torch.testing.assert_close(saved[key], weight, rtol=0, atol=1e-9)


def plugin(version: int = 2, kind: str = "FULL_STATE_DICT") -> SimpleNamespace:
    return SimpleNamespace(fsdp_version=version, state_dict_type=kind, transformer_cls_names_to_wrap=None)


@pytest.mark.parametrize(
    "plugin, muon, message",
    [
        (plugin(version=1), False, "FSDP1 is asked for"),
        (plugin(kind="StateDictType.SHARDED_STATE_DICT"), False, "state_dict_type is StateDictType.SHARDED"),
        (plugin(), True, "muon is set, and the model is to be sharded"),
    ],
)
def test_other_ways_to_shard_are_refused_by_name(make_trainer, plugin, muon, message) -> None:
    trainer = make_trainer(muon=muon)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=message):
        check_sharding(trainer)


def test_a_wrapper_of_peft_is_not_sharded(make_trainer) -> None:
    trainer = make_trainer()
    trainer.model = get_peft_model(trainer.model, LoraConfig(target_modules=["q_proj"]))
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin()))
    with pytest.raises(ValueError, match=r"a PeftModel is to be sharded by FSDP2.*add_adapter"):
        check_sharding(trainer)


def test_a_model_loaded_in_parts_is_refused(make_trainer) -> None:
    trainer = make_trainer()
    trainer.is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="the model was loaded in parts"):
        check_sharding(trainer)


def test_a_dual_encoder_is_not_sharded(make_trainer) -> None:
    trainer = make_trainer()
    trainer.is_fsdp_enabled, trainer.accelerator = True, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin()))
    trainer.bridge = DualBridge.__new__(DualBridge)
    trainer.bridge.model = trainer.model
    with pytest.raises(ValueError, match="accelerate cannot shard dual encoders; leave fsdp out"):
        check_sharding(trainer)


def test_layers_to_wrap_are_those_that_the_model_has(make_trainer) -> None:
    trainer, chosen = make_trainer(), plugin()
    trainer.is_fsdp_enabled, trainer.accelerator = True, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=chosen))
    check_sharding(trainer)
    assert chosen.transformer_cls_names_to_wrap == ["CLIPEncoderLayer", "CLIPVisionEmbeddings", "LlamaDecoderLayer"]
