"""Options of `Trainer` that `MBATTrainer` does not support: each is refused by name at construction.

docs/trainer.md has the complete table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer

from cmai_fast.bridge import DualBridge
from cmai_fast.mbat.config import MBATConfig
from cmai_fast.mbat.quantized import is_quantized

Predicate = Callable[[Any], bool]

_PAST_FORWARD = "a step runs parts of the model outside its forward, so it would have no effect"
_OWN_BACKWARD = "it steps during the backward pass, and a step has several"


def _set(value: Any) -> bool:
    return value not in (None, False, "", {}, [])


def _offloaded(value: Any) -> bool:
    return value not in (None, "none")


def _steps_in_backward(optim: Any) -> bool:
    return str(getattr(optim, "value", optim)) in ("lomo", "adalomo") or "layerwise" in str(optim).lower()


# Field of TrainingArguments: (whether a value is refused, why and what to do).
FIELDS: dict[str, tuple[Predicate, str]] = {
    "fp16": (_set, "the bridge gradient would be scaled twice. Use bf16 or float32"),
    "fp16_full_eval": (_set, "the gradients of its attack would underflow. Use bf16 or float32"),
    "bf16_full_eval": (_set, "it would leave the model in bfloat16. Load the model in it, or set bf16"),
    "torch_compile": (_set, f"{_PAST_FORWARD}. Leave it out, torch_compile_backend and torch_compile_mode too"),
    "use_liger_kernel": (
        _set,
        "its fused loss returns no logits, and no loss per sample. Leave it out: the loss is computed in chunks anyway",
    ),
    "liger_kernel_config": (_set, "use_liger_kernel is not supported. Leave it out"),
    "optim": (_steps_in_backward, f"{_OWN_BACKWARD}. Use another, such as adamw_torch"),
    "optim_target_modules": (_set, "optimizers that project gradients (GaLore, APOLLO) are untested. Leave it out"),
    "parallelism_config": (_set, "tensor, context and sequence parallelism are untested. Use fsdp=True"),
    "ddp_find_unused_parameters": (_set, f"{_PAST_FORWARD}. Leave it out: gradients are averaged without DDP"),
    "ddp_bucket_cap_mb": (_set, f"{_PAST_FORWARD}. Leave it out: gradients are averaged without DDP"),
    "ddp_broadcast_buffers": (_set, f"{_PAST_FORWARD}. Leave it out: gradients are averaged without DDP"),
    "ddp_static_graph": (_set, f"{_PAST_FORWARD}. Leave it out: gradients are averaged without DDP"),
    "remove_unused_columns": (_set, "it would remove images and questions from records. Leave it out"),
    "train_sampling_strategy": (
        lambda value: value not in ("random", "sequential"),
        "records have no lengths before they are collated. Use random or sequential",
    ),
}

# Key of DeepSpeed's config: as in FIELDS.
DEEPSPEED: dict[str, tuple[Predicate, str]] = {
    "zero_optimization.stage": (
        lambda value: value not in (1, 2),
        "expected 1 or 2. To shard the weights too, use FSDP2: MBATConfig(fsdp=True)",
    ),
    "zero_optimization.offload_optimizer.device": (_offloaded, "it is untested. Leave it out"),
    "zero_optimization.offload_param.device": (_offloaded, "it is untested. Leave it out"),
    "zero_optimization.contiguous_gradients": (
        lambda value: value is False,
        "DeepSpeed 0.16.9 and 0.17.6 then give wrong weights (0.16.9 of a plain model too). Leave it out",
    ),
    "fp16.enabled": (_set, "the bridge gradient would be scaled twice. Use bf16 or float32"),
    "optimizer": (_set, "the heads take that of MBATConfig. Leave it out, and set optim"),
    "scheduler": (_set, "the heads follow that of MBATConfig. Leave it out, and set lr_scheduler_type"),
}
_DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "fp16", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
}  # fmt: skip
_ZERO_KEYS = {
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "sub_group_size", "round_robin_gradients", "offload_optimizer", "offload_param",
}  # fmt: skip

# Argument of Trainer: why it is refused, and what to do.
ARGUMENTS: dict[str, str] = {
    "model_init": "MBATTrainer needs the model itself, for its bridge. Give model, and make a trainer for each trial",
}

# Method of Trainer that a subclass may not override.
METHODS: dict[str, str] = {
    "compute_loss": "a step computes the loss of images at the bridge, without calling it. Give compute_loss_func",
}


def check_arguments(trainer: Trainer, args: MBATConfig, given: dict[str, Any]) -> None:
    """Raises ValueError for fields, arguments and overridden methods that would have no effect, or do harm."""
    for name, (refused, reason) in FIELDS.items():
        value = getattr(args, name, None)
        if refused(value):
            raise ValueError(f"{name} is {value!r}, which MBATTrainer does not support: {reason}")
    for name, reason in ARGUMENTS.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} is given, which MBATTrainer does not support: {reason}")
    for name, reason in METHODS.items():
        if getattr(type(trainer), name) is not getattr(Trainer, name):
            raise ValueError(f"{type(trainer).__name__} overrides {name}, which MBATTrainer does not support: {reason}")
    if args.muon and ((given.get("optimizers") or [None])[0] or given.get("optimizer_cls_and_kwargs")):
        raise ValueError("muon is set and an optimizer is given; expected one of the two")
    if args.n_gpu > 1:
        raise ValueError(
            f"this process sees {args.n_gpu} GPUs, of which a step uses one. Start one process per GPU (torchrun "
            f"--nproc-per-node {args.n_gpu}), or set CUDA_VISIBLE_DEVICES"
        )


def check_loss(trainer: Any) -> None:
    """Raises ValueError for a user's loss function if it would not be called, or the bridge has no outputs for it, and
    for heads in a training that does not use them."""
    if (objective := trainer.args.objective) != "task" and (trainer.compute_loss_func or trainer.heads is not None):
        what = "heads are" if trainer.heads is not None else "compute_loss_func is"
        raise ValueError(
            f"{what} given, and objective is {objective!r}, which trains image features alone; expected None"
        )
    if trainer.compute_loss_func is not None and isinstance(trainer.bridge, DualBridge):
        raise ValueError(
            "compute_loss_func is given, which MBATTrainer does not support for dual encoders: their loss is that of "
            "each image among the texts. Leave it out"
        )


def check_graphs(trainer: Any) -> None:
    """Raises ValueError where there is nothing to capture as CUDA graphs."""
    if not trainer.args.cuda_graphs:
        return
    if trainer.args.device.type != "cuda":
        raise ValueError(f"cuda_graphs is True, and the device is {trainer.args.device}; set it to False")
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "cuda_graphs is True, and the model is to be sharded by FSDP2, which gathers weights anew for each pass; "
            "leave fsdp or cuda_graphs out"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError("cuda_graphs is True, and DeepSpeed is asked for, which is untested; expected one of the two")


def check_dispatch(trainer: Any) -> None:
    """Leaves the batches of a stream as the collator made them, unless asked otherwise: accelerate would have the
    first process read for all, cut every tensor to as many rows, and not join texts of different lengths.

    Raises:
        ValueError: it was asked to cut the texts of a dual encoder, which belong to all samples.
    """
    asked = trainer.accelerator.dispatch_batches
    if asked and isinstance(trainer.bridge, DualBridge):
        raise ValueError(
            "dispatch_batches is set, which MBATTrainer does not support for dual encoders: accelerate would cut the "
            "texts, which belong to all samples of a batch. Leave it out"
        )
    if asked is None:
        trainer.accelerator.dataloader_config.dispatch_batches = False


def check_deepspeed(trainer: Any, given: dict[str, Any]) -> None:
    """Raises ValueError for what MBATTrainer cannot do under DeepSpeed, or was never tested there. `max_grad_norm`
    becomes the `gradient_clipping` of a config without one, in which it would have no effect."""
    config, args = trainer.accelerator.state.deepspeed_plugin.hf_ds_config, trainer.args
    for name, (refused, reason) in DEEPSPEED.items():
        if refused(value := config.get_value(name)):
            raise ValueError(f"deepspeed's {name} is {value!r}, which MBATTrainer does not support: {reason}")
    zero = config.config["zero_optimization"]
    unknown = [name for name in config.config if name not in _DEEPSPEED_KEYS]
    unknown += [f"zero_optimization.{k}" for k in zero if k not in _ZERO_KEYS and not k.startswith("stage3_")]
    if unknown:
        raise ValueError(
            f"deepspeed's config sets {', '.join(unknown)}, which is untested in MBATTrainer; leave it out"
        )
    vision = {id(p) for p in trainer.bridge.vision_parameters}
    others = any(p.requires_grad for p in trainer.model.parameters() if id(p) not in vision)
    beside = {
        "an optimizer or a scheduler is given, which Trainer drops": any(given.get("optimizers") or ()),
        "muon is set, whose matrices ZeRO flattens": args.muon,
        f"consistency_steps is {args.consistency_steps}, and steps on S_c alone would move the language model too, "
        "which has no gradient in them": args.consistency_steps > 0,
        f"objective is {args.objective!r} and trainable not 'vision', and weight decay would move the language model "
        "too": args.objective != "task" and others,
        "the model is quantised, which is untested": is_quantized(trainer.model),
        f"{type(trainer.model).__name__} is a dual encoder, whose scale may have no dimensions, on which DeepSpeed "
        "fails": isinstance(trainer.bridge, DualBridge),
    }
    for what, there in beside.items():
        if there:
            raise ValueError(f"{what}, and DeepSpeed is asked for; leave one out (without it each process has a copy)")
    config.config.setdefault("gradient_clipping", args.max_grad_norm)


def check_sharding(trainer: Any) -> None:
    """Raises ValueError for ways to shard the model other than FSDP2, and for models that it cannot shard."""
    model = trainer.model
    if trainer.is_distributed_loading_by_transformers:
        raise ValueError(
            "the model was loaded in parts (distributed_config); load it whole, and MBATConfig(fsdp=True) shards it"
        )
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP{plugin.fsdp_version} is asked for; MBATTrainer runs parts of the model outside its forward, "
            "which only FSDP2 allows. Set fsdp_config={'version': 2}, or fsdp_version: 2 for accelerate launch"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp's state_dict_type is {plugin.state_dict_type}, with which no plain model would be saved; "
            "expected FULL_STATE_DICT"
        )
    if trainer.args.objective != "task":
        raise ValueError(
            f"objective is {trainer.args.objective!r}, and the model is to be sharded by FSDP2, which is untested; "
            "leave fsdp out (each process then has a copy)"
        )
    if trainer.args.muon or is_quantized(model):
        what = "muon is set" if trainer.args.muon else "the model is quantised"
        raise ValueError(f"{what}, and the model is to be sharded by FSDP2; expected one of the two")
    if trainer.bridge.model is not model:
        raise ValueError(
            f"a {type(model).__name__} is to be sharded by FSDP2, whose wrapper the parts of the model do not "
            "run through; put the adapters in by model.add_adapter(config) instead of get_peft_model"
        )
    if isinstance(trainer.bridge, DualBridge):
        raise ValueError(
            f"{type(model).__name__} is to be sharded by FSDP2, but accelerate cannot shard dual encoders; "
            "leave fsdp out (each process then has a copy)"
        )
    if plugin.transformer_cls_names_to_wrap is None:
        # Accelerate asks for all of `_no_split_modules`; LLaVA's names layers of CLIP's text side, which it lacks.
        there = {type(m).__name__ for m in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(there & set(getattr(model, "_no_split_modules", ())))
