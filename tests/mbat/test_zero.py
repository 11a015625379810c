"""MBATTrainer with DeepSpeed: ZeRO-1 and ZeRO-2 on two processes train as one process with the whole batch.

Runs need DeepSpeed, which is no dependency of the tests; docs/scale.md says how to get it for a CPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from transformers import AutoModelForImageTextToText

from cmai_fast.bridge import DualBridge
from cmai_fast.mbat import zero
from cmai_fast.mbat.refused import check_deepspeed
from launcher import Launcher, Train, assert_same, trains

with_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
both_stages = pytest.mark.parametrize("stage", [1, 2])

# Steps of plain SGD show every gradient as it is. Under L2 the attack is a continuous function of the weights, so that
# float32 (DeepSpeed's masters have no float64) rounds alike; a step along signs would jump.
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd",
    "max_grad_norm": 0.5, "inner_steps": 2, "refreshes": 1, "beta": 0.2, "gamma": 0.5, "tau_train": 0.9, "norm": "l2",
    "eps": 3.0, "logging_steps": 1, "lr_scheduler_type": "constant", "eval_strategy": "no", "save_strategy": "no",
    "weight_decay": 0.01,
}  # fmt: skip
# Epsilon is above what rounding leaves of gradients that are 0, such as those of the keys' biases.
ADAPTIVE: dict[str, Any] = {
    "max_steps": 4, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "adam_epsilon": 1e-4,
    "learning_rate": 0.01, "lr_scheduler_type": "linear", "lam": 0.1, "save_strategy": "steps", "save_steps": 2,
    "eval_strategy": "steps", "eval_steps": 2, "eval_attack_steps": 5, "per_device_eval_batch_size": 2,
}  # fmt: skip
# Weights are of the size of 1 and differ by up to 4e-7 after these steps, which change some by 0.03 and more.
TOLERANCE = 2e-6


def config(stage: int, **changes: Any) -> dict[str, Any]:
    """`zero2.json` of LLaVA, which says nothing of clipping, with another stage."""
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9}
    scaling = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
    return {
        "fp16": {"enabled": "auto", "min_loss_scale": 1} | scaling,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": zero | {"reduce_bucket_size": "auto"} | changes,
    }


@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for part in make_tiny():
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def train(folder: Path, launcher: Launcher) -> Train:
    return trains(launcher, folder, SETTINGS)


# Buckets of a few rows, whose borders lie inside parameters.
SMALL = {"overlap_comm": False, "round_robin_gradients": True, "reduce_bucket_size": 300, "allgather_bucket_size": 500}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({}, {}),
    "adaptive": (ADAPTIVE, {}),
    "small buckets": (ADAPTIVE, SMALL),
    "unclipped": ({"max_grad_norm": 0.0, "learning_rate": 0.01}, {}),
    # One process has no gradient at the vision side, where the other has one.
    "texts": ({"texts": True, "gamma": 0.0, "beta": 0.0, "arm": False}, {}),
    "adversarial": ({"lam": 1.0, "inner": "pgd", "gradient_accumulation_steps": 2}, {}),
    "words": ({"modality": "both"}, {}),
    "projector": ({"freeze": ["vision_tower", "language_model"]}, {}),
    "checkpointed": (ADAPTIVE | {"gradient_checkpointing": True}, {}),
    "recomputed": (ADAPTIVE | {"recompute": "full"}, {}),
    "adapters": (ADAPTIVE | {"adapters": True}, {}),
    "wrapped adapters": (ADAPTIVE | {"adapters": "wrapped"}, {}),
    "verifier": (ADAPTIVE | {"verifier": True}, {}),
    "fare": (
        {"objective": "fare", "inner": "pgd", "beta": 0.0, "gamma": 0.0, "tau_train": None, "trainable": "vision"},
        {},
    ),
}


@with_deepspeed
@both_stages
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_without_deepspeed(make_tiny, train: Train, stage: int, case: str) -> None:
    settings, zero_optimization = CASES[case]
    one, one_said = train(f"one {'adaptive' if settings is ADAPTIVE else case}", 1, **settings)
    two, two_said = train(f"two {stage} {case}", 2, **settings, deepspeed=config(stage, **zero_optimization))
    assert_same(one, two, TOLERANCE)
    if "adapters" not in case:
        start = {f"model.{k}": v.detach() for k, v in make_tiny()[0].named_parameters()}
        assert max(float((v - one[k]).abs().max()) for k, v in start.items()) > 1000 * TOLERANCE
    for mine, whole in zip(two_said["logs"], one_said["logs"], strict=True):
        for key in whole.keys() & {"loss", "loss_clean", "loss_adv", "grad_norm", "learning_rate", "s_c_adv"}:
            assert mine[key] == pytest.approx(whole[key], rel=1e-4), key
    for mine, whole in zip(two_said["evaluations"], one_said["evaluations"], strict=True):
        for key in ("loss", "accuracy", "s_c", "robust_loss", "robust_accuracy", "robust_s_c"):
            assert mine[f"eval_{key}"] == pytest.approx(whole[f"eval_{key}"], rel=1e-4), key


@with_deepspeed
@pytest.mark.parametrize("side", ["_language_side", "_vision_side"])
def test_memory_that_runs_out_in_one_process_makes_parts_in_both(train: Train, side: str) -> None:
    one, _ = train("one in parts", 1)
    assert_same(one, train(f"two in parts{side}", 2, scarce=[side, 2], deepspeed=config(2))[0], TOLERANCE)


@with_deepspeed
@both_stages
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_is_saved_and_resumes_to_the_same_weights(folder: Path, train: Train, stage: int, bf16: bool) -> None:
    settings = ADAPTIVE | {"bf16": bf16, "deepspeed": config(stage)}
    name = f"whole {stage} {bf16}"
    whole, _ = train(name, 2, **settings)
    rest, _ = train(f"rest {stage} {bf16}", 2, **settings, resume_from_checkpoint=str(folder / name / "checkpoint-2"))
    assert_same(whole, rest, 0)
    model = AutoModelForImageTextToText.from_pretrained(folder / name / "checkpoint-4")
    assert model.dtype == (torch.bfloat16 if bf16 else torch.float32)
    saved = {f"model.{k}": v.detach() for k, v in model.named_parameters()}
    assert_same({k: v for k, v in whole.items() if k.startswith("model.")}, saved, 0)


@with_deepspeed
def test_the_best_checkpoint_is_loaded_with_its_heads(train: Train) -> None:
    settings = ADAPTIVE | {
        "load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that it is the first one
    }  # fmt: skip
    one, _ = train("one best", 1, **settings)
    assert_same(one, train("two best", 2, **settings, deepspeed=config(2))[0], TOLERANCE)


@with_deepspeed
@both_stages
def test_in_bf16_small_steps_are_kept(train: Train, stage: int) -> None:
    """The masters are float32: bfloat16 alone would round a step of a thousandth of a weight away."""
    settings = {"learning_rate": 1e-3, "max_steps": 8}
    one, one_said = train("one small", 1, **settings)
    two, two_said = train(f"two small {stage}", 2, **settings, bf16=True, deepspeed=config(stage))
    assert_same(one, {k: v.float() for k, v in two.items()}, 8e-3)
    lost = [entry["loss_clean"] for entry in one_said["logs"]]
    assert lost[-1] < lost[0] - 0.01
    assert [entry["loss_clean"] for entry in two_said["logs"]] == pytest.approx(lost, rel=0.01)


class Engine:
    """What `zero.step` asks of DeepSpeed's."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, []

    def __call__(self) -> torch.Tensor:
        self.calls.append("forward")
        return self.module()

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self.calls.append(boundary)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        self.calls.append("backward")
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        self.calls.append("step")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_go_through_the_engine_in_one_pass(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(dtype)
    parameters = list(model.parameters())
    heard: list[int] = []
    for i, p in enumerate(parameters):
        p.register_post_accumulate_grad_hook(lambda p, i=i: heard.append(i))
    with zero.without_hooks(parameters):
        for scale in (1, 2):
            (scale * model[0](torch.ones(5, 3, dtype=dtype))).square().sum().backward()
    assert heard == []
    wanted = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
    assert [g is None for g in wanted] == [False, False, True, True]
    engine = Engine(model)
    zero.step(engine, parameters)
    assert engine.calls == ["forward", True, "backward", "step"]
    assert sorted(heard) == [0, 1, 2, 3]
    for p, g in zip(parameters, wanted, strict=True):
        assert torch.equal(p.grad, torch.zeros_like(p) if g is None else g)
    assert "forward" not in vars(model) and model(torch.ones(1, 3, dtype=dtype)).shape == (1, 2)


def test_hooks_come_back_after_an_error() -> None:
    p, heard = nn.Parameter(torch.ones(2)), []
    p.register_post_accumulate_grad_hook(heard.append)
    with pytest.raises(RuntimeError, match="of memory"), zero.without_hooks([p]):
        raise RuntimeError("out of memory")
    p.sum().backward()
    assert len(heard) == 1


def test_a_gradient_that_is_not_finite_never_reaches_deepspeed(make_trainer) -> None:
    trainer = make_trainer()
    next(trainer.model.parameters()).grad = torch.full_like(next(trainer.model.parameters()), float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 0"):
        trainer._step_by_deepspeed()


def test_a_step_without_images_says_what_deepspeed_makes_of_it(make_trainer) -> None:
    trainer = make_trainer()
    trainer.deepspeed = Engine(trainer.model)
    trainer.model.lm_head.weight.grad = torch.ones_like(trainer.model.lm_head.weight)
    with pytest.warns(RuntimeWarning, match="no sample of step 0 has an image, and DeepSpeed still moves the vision"):
        trainer._step_by_deepspeed()
    assert trainer.deepspeed.calls[-1] == "step"


def test_a_checkpoint_of_deepspeed_is_not_resumed_without_it(make_trainer, tmp_path) -> None:
    """Trainer finds no optimizer.pt in it, and would go on with a new optimizer and schedule."""
    make_trainer(max_steps=2).train()
    folder = tmp_path / "out" / "checkpoint-2"
    (folder / "optimizer.pt").rename(folder / "global_step2")
    with pytest.raises(ValueError, match=r"checkpoint-2 was saved with DeepSpeed.*; resume with deepspeed set, or"):
        make_trainer().train(resume_from_checkpoint=str(folder))


def under(trainer: Any, config: dict[str, Any]) -> Any:
    """The trainer with what it looks at of accelerate's plugin."""
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(config))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    return trainer


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage is 3, .* expected 1 or 2.*use FSDP2"),
        ({"zero_optimization": {}}, "zero_optimization.stage is None"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device is 'cpu', .* untested. Leave it",
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme"}}}, "offload_param.device is 'nvme'"),
        (
            {"zero_optimization": {"stage": 2, "zenflow": {}}},
            "config sets zero_optimization.zenflow, which is untested",
        ),
        (
            {"zero_optimization": {"stage": 1, "contiguous_gradients": False}},
            "contiguous_gradients is False, .* wrong weights",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, .* Use bf16 or float32"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is {'type': 'AdamW'}.* set optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is {'type': 'WarmupLR'}.* set lr_scheduler_type"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "config sets data_types, which is untested"),
    ],
)
def test_configs_that_cannot_work_are_refused_by_name(make_trainer, changes, message) -> None:
    trainer = under(make_trainer(), {**config(2), "fp16": {"enabled": False}} | changes)
    with pytest.raises(ValueError, match=message):
        check_deepspeed(trainer, {})


def test_what_cannot_work_beside_deepspeed_is_refused_by_name(make_trainer) -> None:
    def refused(message: str, given: dict[str, Any] | None = None, **settings: Any) -> None:
        trainer = under(make_trainer(), {"zero_optimization": {"stage": 2}})
        for name, value in settings.items():
            setattr(trainer if name == "bridge" else trainer.args, name, value)
        with pytest.raises(ValueError, match=f"{message}.*, and DeepSpeed is asked for; leave one out"):
            check_deepspeed(trainer, given or {})

    refused("muon is set", muon=True)
    refused("consistency_steps is 2, and steps on S_c alone", consistency_steps=2)
    refused("an optimizer or a scheduler is given", {"optimizers": (None, object())})
    dual = DualBridge.__new__(DualBridge)
    dual.model = nn.Module()
    refused("LlavaForConditionalGeneration is a dual encoder", bridge=dual)
    alone = {"inner": "pgd", "beta": 0.0, "gamma": 0.0, "objective": "fare"}
    refused("objective is 'fare' and trainable not 'vision'", **alone)
    trainer = under(make_trainer(trainable="vision"), {"zero_optimization": {"stage": 2}})
    for name, value in alone.items():
        setattr(trainer.args, name, value)
    check_deepspeed(trainer, {})
    trainer.model.is_quantized = True
    with pytest.raises(ValueError, match="the model is quantised, which is untested, and DeepSpeed"):
        check_deepspeed(trainer, {})


def test_max_grad_norm_clips_where_the_config_says_nothing(make_trainer) -> None:
    for before, after in (({}, 0.25), ({"gradient_clipping": 1.0}, 1.0)):
        trainer = under(make_trainer(max_grad_norm=0.25), {"zero_optimization": {"stage": 2}, **before})
        check_deepspeed(trainer, {"optimizers": (None, None)})
        plugin = trainer.accelerator.state.deepspeed_plugin
        assert plugin.hf_ds_config.config["gradient_clipping"] == after
