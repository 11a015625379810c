"""docs/trainer.md: the table is complete, what it calls refused is refused, and what it says works does."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

import trainer_table as table
from cmai_fast.data import Sample
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat.refused import ARGUMENTS, FIELDS, METHODS


def test_every_field_and_argument_of_trainer_is_in_the_table():
    known = set(table.fields())
    assert {f.name for f in dataclasses.fields(TrainingArguments)} <= known, "say in trainer_table.py what it does"
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert arguments <= set(table.GIVEN) | set(ARGUMENTS)
    assert all(hasattr(Trainer, name) for name in (*table.OVERRIDDEN, *METHODS))
    assert not set(table.WORKS) & set(FIELDS) and set(table.IN_PART) <= set(FIELDS)
    public = {n for n in dir(MBATTrainer) if not n.startswith("_") and callable(getattr(Trainer, n, None))}
    changed = {n for n in public if getattr(MBATTrainer, n) is not getattr(Trainer, n)}
    assert changed == set(table.OVERRIDDEN)


@pytest.mark.skipif(not transformers.__version__.startswith("5.23"), reason="written for transformers 5.23")
def test_the_page_is_that_of_the_table():
    assert table.DOCUMENT.read_text(encoding="utf-8") == table.document(), "run python tests/trainer_table.py"


REFUSED = {
    "fp16": True, "fp16_full_eval": True, "bf16_full_eval": True, "torch_compile": True, "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True}, "optim": "adalomo", "optim_target_modules": ["mlp"],
    "parallelism_config": object(),
    "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 25, "ddp_broadcast_buffers": True,
    "ddp_static_graph": True, "remove_unused_columns": True, "train_sampling_strategy": "group_by_length",
}  # fmt: skip


def config(folder: Any, **values: Any) -> MBATConfig:
    return MBATConfig(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **values)


@pytest.mark.parametrize("name", FIELDS)
def test_what_cannot_work_is_refused_when_the_trainer_is_made(tiny_model, tiny_processor, tmp_path, name):
    args = config(tmp_path)
    setattr(args, name, REFUSED[name])
    with pytest.raises(ValueError, match=rf"{name} is .*, which MBATTrainer does not support: "):
        MBATTrainer(tiny_model, args, processing_class=tiny_processor)


def test_fields_that_are_refused_are_refused_when_they_are_set_later(make_trainer):
    trainer = make_trainer()
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="torch_compile is True, which MBATTrainer does not support"):
        trainer.train()


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_step_in_the_backward_pass_are_refused(tiny_model, tiny_processor, tmp_path, optim):
    with pytest.raises(ValueError, match=r"optim is .* it steps during the backward pass, and a step has several"):
        MBATTrainer(tiny_model, config(tmp_path, optim=optim), processing_class=tiny_processor)


def test_arguments_and_methods_that_cannot_work_are_refused(tiny_model, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="model_init is given, which MBATTrainer does not support"):
        MBATTrainer(None, config(tmp_path), processing_class=tiny_processor, model_init=lambda: tiny_model)

    class Own(MBATTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(ValueError, match=r"Own overrides compute_loss, which .* Give compute_loss_func"):
        Own(tiny_model, config(tmp_path), processing_class=tiny_processor)
    several = config(tmp_path)
    several._n_gpu = 2
    with pytest.raises(ValueError, match=r"this process sees 2 GPUs, of which a step uses one. Start one process per"):
        MBATTrainer(tiny_model, several, processing_class=tiny_processor)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        MBATTrainer(tiny_model, config(tmp_path), processing_class=tiny_processor, losses=1)


def test_arguments_may_be_positional_as_those_of_trainer(tiny_model, tiny_processor, tmp_path, data):
    trainer = MBATTrainer(tiny_model, config(tmp_path), None, data, None, tiny_processor)
    assert trainer.train_dataset is data and trainer.processing_class is tiny_processor


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def run(make_trainer: Any, **options: Any) -> Any:
    trainer = make_trainer(**({"max_steps": 2, "save_strategy": "no"} | options))
    trainer.train()
    return trainer


CHANGES_NOTHING = {
    "torch_empty_cache_steps": 1, "auto_find_batch_size": True, "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2, "skip_memory_metrics": False,
    "include_num_input_tokens_seen": "non_padding", "logging_first_step": True,
    "activation_checkpointing": True, "use_cache": True, "eval_on_start": True, "eval_attack_steps": 0,
}  # fmt: skip


def test_what_must_not_change_the_weights_does_not(make_trainer, data):
    """All at once: workers, memory, logs, recomputation, an evaluation before the first step."""
    plain = run(make_trainer)
    other = run(make_trainer, **CHANGES_NOTHING, eval_strategy="no", eval_dataset=Subset(data, range(2)))
    for p, q in zip(weights(plain), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert other.state.num_input_tokens_seen > 0


def test_modules_that_are_watched_change_only_the_rounding(make_trainer):
    """Hooks on an activation function have to see it, so it is not fused with what follows."""
    plain, watched = (
        run(make_trainer, max_steps=1, logging_steps=1, **options).state.log_history[0]
        for options in ({}, {"debug": "underflow_overflow"})
    )
    assert watched["loss"] == pytest.approx(plain["loss"], rel=1e-5)


CHANGES = {
    "neftune_noise_alpha": 50.0, "label_smoothing_factor": 0.5, "weight_decay": 0.5, "adam_beta1": 0.1,
    "max_grad_norm": 1e-6, "warmup_steps": 1, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
    "loss_reduction": "samples",
}  # fmt: skip


def test_what_must_change_the_weights_does(make_trainer, data):
    """Answers of one word and of two, so that reductions differ."""
    samples = [data[i] for i in range(8)]
    samples[1] = Sample(1, samples[1].images, samples[1].prompt, ("red shape",), ("blue", "red shape"))
    given = {"given": {"train_dataset": samples}, "lr_scheduler_type": "linear", "inner": "none", "gamma": 0.0}
    plain = weights(run(make_trainer, **given))
    assert all(torch.equal(p, q) for p, q in zip(plain, weights(run(make_trainer, **given)), strict=True))
    for name, value in CHANGES.items():
        other = weights(run(make_trainer, **(given | {name: value})))
        assert max(float((p - q).abs().max()) for p, q in zip(plain, other, strict=True)) > 1e-6, name


def test_metrics_see_what_those_of_trainer_see(make_trainer, data):
    seen: list[Any] = []

    def metrics(p: Any, compute_result: bool = True) -> dict[str, float]:
        seen.append((p, compute_result))
        return {"mine": float(np.mean(np.asarray(p.label_ids[0]) != -100))} if compute_result else {}

    options = {
        "eval_dataset": Subset(data, range(3)), "per_device_eval_batch_size": 2, "eval_attack_steps": 1,
        "include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1,
    }  # fmt: skip
    functions = {
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: (
            logits[0].argmax(-1) if isinstance(logits, tuple) else logits.argmax(-1)
        ),
    }
    trainer = make_trainer(**options, given=functions)
    found = trainer.evaluate()
    assert 0 < found["eval_mine"] <= 1 and "eval_robust_accuracy" in found
    (given, _) = seen[-1]
    assert given.predictions.ndim == 2 and given.inputs is not None and given.losses is not None
    seen.clear()
    trainer = make_trainer(**options, batch_eval_metrics=True, eval_do_concat_batches=False, given=functions)
    assert trainer.evaluate()["eval_mine"] > 0
    assert [last for _, last in seen] == [False, True]
    assert trainer.predict(Subset(data, range(2))).predictions is not None
    only = make_trainer(**options, prediction_loss_only=True).evaluate()
    assert only["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.evaluated: list[int] = []

    def on_evaluate(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.evaluated.append(state.global_step)


def test_evaluations_and_checkpoints_come_when_they_are_asked_for(make_trainer, data, tmp_path):
    steps = Steps()
    run(
        make_trainer, max_steps=3, eval_strategy="steps", eval_steps=1, eval_delay=2, eval_attack_steps=0,
        save_strategy="steps", save_steps=2, save_only_model=True, callbacks=[steps],
        eval_dataset=Subset(data, range(2)), dataloader_drop_last=True,
    )  # fmt: skip
    assert steps.evaluated == [2, 3]
    saved = {p.name for p in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "cmcv", "complete"} <= saved
    assert not {"optimizer.pt", "heads_optimizer.pt"} & saved
