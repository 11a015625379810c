"""MBATTrainer: a `transformers.Trainer` whose step is adversarial."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer

from cmai_fast.attacks import Passes
from cmai_fast.attacks.words import check_words
from cmai_fast.bridge import bridge_of, lean_activations, set_recompute, unpack
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.mbat import optimizers, ranks, shards, zero
from cmai_fast.mbat.adapters import adapter_parameters, check_adapters_learn, check_saving, has_adapters, train_only
from cmai_fast.mbat.batches import RecordCollator, checked
from cmai_fast.mbat.config import MBATConfig
from cmai_fast.mbat.drift import Original
from cmai_fast.mbat.evaluating import EvaluatingTrainer
from cmai_fast.mbat.parts import DoesNotFitError, RNGState, gradients_aside, halved
from cmai_fast.mbat.quantized import check_vision_side, freeze_language_model, is_quantized, trainable_in_part
from cmai_fast.mbat.refused import (
    check_arguments,
    check_deepspeed,
    check_dispatch,
    check_graphs,
    check_loss,
    check_sharding,
)
from cmai_fast.pixels import PixelSpace


class MBATTrainer(EvaluatingTrainer):
    """Drop-in replacement for `Trainer`: the same arguments, plus `heads`. docs/trainer.md describes each of them.

    Args:
        model: as for `Trainer`; one that `bridge_of` supports.
        args: an `MBATConfig`.
        data_collator: None uses `VQACollator` with the processor, for all records that `Sample.of` takes.
        processing_class: the model's processor; its mean and std turn `eps` into the model's input space.
        compute_loss_func: as for `Trainer`, for both branches. Attacks still maximise L_task, so the `bridge` solver
            takes one more full pass.
        heads: trained consistency heads, or a verifier without a tower of its own, to continue with; None: new heads if
            beta or gamma needs them. A verifier learns from all that is said of a picture (`Verifier.for_data`).
        All other arguments are `Trainer`'s own.

    Batches are what the model's own forward takes: for a generative model `pixel_values`, `input_ids`,
    `attention_mask`, `labels` and other inputs of its family. A sample without image tokens is trained on its text.
    `sample_ids` (N,), numbers or anything hashable, seed the samples' random starts; `negative_input_ids`,
    `negative_attention_mask`, `negative_labels` (N, K, M) are wrong answers for the contrastive loss of heads, and
    `statement_ids`, `statement_answers` what a verifier reads (`VQACollator(statements=...)`).

    The loss is reduced as `Trainer` does it, over the answer tokens of an optimizer step; see
    `MBATConfig.loss_reduction`. The heads have their own optimizer, which follows the schedule.

    Under `torchrun` or `accelerate launch` each process has a copy of the model, and a step equals that of one process
    with the whole batch. With FSDP2 (`MBATConfig(fsdp=True)`) each process has a shard of the model, with DeepSpeed
    (ZeRO stages 1 and 2) one of the optimizer's state; FSDP1 and ZeRO-3 raise ValueError.

    `evaluate` and `eval_strategy` report, beside `Trainer`'s metrics, the means over samples of L_task (`eval_loss`,
    `eval_robust_loss`), of right answers (`eval_accuracy`, `eval_robust_accuracy`) and, with heads, of S_c (`eval_s_c`,
    `eval_robust_s_c`): clean, and under PGD at the full `eps` (`MBATConfig.eval_attack_steps`). With a
    `compute_loss_func` `eval_loss` is that of `Trainer`.

    For a model with adapters (PEFT's LoRA, by `add_adapter` or `get_peft_model`) only the adapters are saved; other
    trainable parameters raise ValueError.

    Checkpoints hold the heads (`cmcv/`) and their optimizer, ARM's state and the passes so far (`mbat.json`) and,
    written last, the file `complete`; see `last_checkpoint`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MBATConfig | None = None,
        data_collator: Any = None,
        *positional: Any,
        heads: ConsistencyHeads | Verifier | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MBATConfig):
            raise TypeError(f"args is a {type(args).__name__}; MBATTrainer takes an MBATConfig")
        parts = signature(Trainer.__init__).bind(self, model, args, data_collator, *positional, **kwargs).arguments
        check_arguments(self, args, parts)
        processor = parts.get("processing_class")
        if processor is None:
            raise ValueError("processing_class is None; MBATTrainer needs the model's processor for its mean and std")
        if model is None:
            raise ValueError("model is None; MBATTrainer needs the model itself, not model_init")
        self.bridge = bridge_of(model)
        self.space = PixelSpace.from_processor(processor)
        self.verifier = heads.of(self.bridge) if isinstance(heads, Verifier) else None
        self.heads = self.verifier.network if self.verifier else heads  # type: ignore[assignment]
        if args.consistency_steps and not self.verifier:
            raise ValueError(
                f"consistency_steps is {args.consistency_steps}, and heads is no Verifier; give one "
                "(Verifier.for_data(model, processor, records)), or set it to 0"
            )
        if self.verifier and (args.gamma or args.consistency_steps):
            self.verifier.network.requires_grad_(True)  # one that was loaded or fitted comes frozen
        if self.heads is None and (args.lowers_consistency or args.gamma):
            if not args.gamma:
                raise ValueError(
                    f"beta is {args.beta}, gamma 0 and heads None: attacks would lower the S_c of random heads that "
                    "never learn. Give trained heads, set gamma above 0, or beta to 0"
                )
            self.heads = self._new_heads(args)
        self.passes = Passes()
        self._logged: defaultdict[str, list[Tensor]] = defaultdict(list)  # 0-d, on the GPU: reading one waits for it
        self._rows_at_once: int | None = None  # set when memory ran out
        self._heads_given, self._heads_optimizer, self._scores = heads is not None, None, []
        self._check_arm(args)
        self._leader: torch.optim.Optimizer | None = None  # the one that the heads' optimizer follows
        self._step_heads: Callable[[], None] | None = None  # where DeepSpeed steps the model
        self._named_optimizer = False  # whether args.optim says what steps the model
        self._original = Original(self.bridge) if args.objective == "fare" or args.anchor else None
        self._prepare_model(model, args)
        if data_collator is None:
            statements = self.verifier.statements if self.verifier else None
            data_collator = RecordCollator(processor, self.bridge, args, statements)
        with trainable_in_part(model):
            super().__init__(model, args, data_collator, *positional, **kwargs)
        if self.is_deepspeed_enabled:
            check_deepspeed(self, parts)
        elif self.is_fsdp_enabled or self.is_distributed_loading_by_transformers:
            check_sharding(self)
        self._check_embeddings()
        check_loss(self)
        check_graphs(self)
        check_dispatch(self)
        if self._original is not None:
            self._original.to(args.device)
        if self.heads is not None:
            self.heads.to(args.device)
            ranks.copy_from_first(self.heads.parameters())

    def _new_heads(self, args: MBATConfig) -> ConsistencyHeads:
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            return ConsistencyHeads(self.bridge.image_dim, self.bridge.text_dim)

    def _prepare_model(self, model: nn.Module, args: MBATConfig) -> None:
        """Sets which parameters learn, and which activations are recomputed."""
        check_adapters_learn(model)
        self._made_for = {name: getattr(args, name) for name in ("trainable", "objective")}
        if args.trainable == "vision":
            train_only(model, self.bridge.vision_parameters)
        if is_quantized(model):
            freeze_language_model(self.bridge, adapter_parameters(model))
            unpack(model)  # permanently: evaluation during training would round the weights
            if not has_adapters(model):
                check_vision_side(self.bridge)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient, so there is nothing to train; "
                "unfreeze it with requires_grad_(), or load an adapter with is_trainable=True"
            )
        if any(p.dtype == torch.float16 for p in model.parameters()):
            raise ValueError(
                "weights of the model are in float16, in which the bridge gradient underflows; load it with "
                "dtype=torch.bfloat16 or torch.float32"
            )
        self._recompute = args.recompute
        set_recompute(model, self.bridge.vision_side, args.recompute)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._check_changes()
        if self.args.consistency_steps and not any(p.requires_grad for p in self.bridge.vision_parameters):
            raise ValueError(
                f"consistency_steps is {self.args.consistency_steps}, and no parameter of the vision side learns, "
                "which is all that these steps train; unfreeze it, or set it to 0"
            )
        self._scores = []  # of a step that was interrupted
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._let_heads_learn()
        shards.run_through_root(self.bridge)
        return prepared

    def _check_embeddings(self) -> None:
        """Raises ValueError for what reads the input embeddings of a model that has none, or is sharded."""
        if self.args.words:
            check_words(self.bridge)
        if (self.verifier or self.args.words) and shards.is_sharded(self.model):
            what = "heads is a verifier" if self.verifier else f"modality is {self.args.modality!r}"
            raise ValueError(
                f"{what}, which reads the input embeddings, and the model is sharded (FSDP); give ConsistencyHeads and "
                "modality 'image', or train without FSDP"
            )

    def _check_changes(self) -> None:
        """Settings that were changed since the trainer was made take effect, or are refused."""
        args = self.args
        check_arguments(self, args, {})
        if self.is_deepspeed_enabled:
            check_deepspeed(self, {})
        self._check_arm(args)
        check_graphs(self)
        self._check_embeddings()
        for name, value in self._made_for.items():
            if getattr(args, name) != value:
                raise ValueError(
                    f"{name} was {value!r} when the trainer was made and is {getattr(args, name)!r} now; set it before"
                )
        if args.recompute != self._recompute:
            raise ValueError(
                f"recompute was {self._recompute!r} when the trainer was made and is {args.recompute!r} now; set it "
                "before"
            )
        if args.anchor and self._original is None:
            raise ValueError(
                f"anchor was 0 when the trainer was made, which then copied no vision side, and is {args.anchor} now; "
                "set it before"
            )
        if self.heads is None and (args.gamma or args.lowers_consistency):
            raise ValueError(
                f"gamma is {args.gamma} and beta {args.beta}, and there are no consistency heads: they were 0 when the "
                "trainer was made. Set them before, or give heads"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, or `MuonAdamW`; the heads have one of their own."""
        # Not sooner: users free parameters between making the trainer and train().
        check_saving(self.model, Path(self.args.output_dir))
        model = self.model if model is None else model
        if self.args.muon and self.optimizer is None:
            self.optimizer = optimizers.muon(model, self.args, set(self.get_decay_parameter_names(model)))
            return self.optimizer
        if self.optimizer is None:
            self._named_optimizer = self.optimizer_cls_and_kwargs is None
        return super().create_optimizer(model)

    def _let_heads_learn(self) -> None:
        """Makes their optimizer, once, and lets it follow whatever steps the model: an optimizer of the user's, or of a
        subclass."""
        leader = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.heads is None or not self.args.gamma or leader is None:
            return
        if self._heads_optimizer is None:
            if not all(p.requires_grad for p in self.heads.parameters()):
                warnings.warn(
                    "gamma is above 0, but parameters of the heads require no gradient, so they do not learn; call "
                    "heads.requires_grad_(), or set gamma=0 to skip their loss",
                    RuntimeWarning,
                    stacklevel=2,
                )
            named = self.get_optimizer_cls_and_kwargs(self.args, self.model) if self._named_optimizer else None
            self._heads_optimizer = optimizers.for_heads(self.heads, self.args, named)
        if leader is not self._leader:
            self._leader, step = leader, optimizers.step_behind(leader, self._heads_optimizer, self.args)
            if self.is_deepspeed_enabled:
                self._step_heads = step  # DeepSpeed steps the leader once per parameter group
            else:
                leader.register_step_post_hook(step)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One MBAT step; returns the total loss, 0-d, detached.

        If memory runs out, the step is repeated in two or more parts, and so are the following steps; gradients are
        those of the whole batch. This takes a second pass of the vision side. With a sharded model, or if a single
        sample does not fit, torch.OutOfMemoryError says what helps.
        """
        self._check_changes()
        self._let_heads_learn()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # of a schedule-free optimizer
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        inputs = checked(self.bridge, inputs)
        rows = len(inputs["labels"])
        ranks.check_equal(rows)
        self._items = num_items_in_batch
        trained = [*self.model.parameters(), *(self.heads.parameters() if self.heads is not None else [])]
        trained = [p for p in trained if p.requires_grad]
        passes, rng = self.passes, RNGState(self.args.device)
        # Also around the backward passes: they must recompute what ran in the forward passes.
        with lean_activations(self.bridge.model), self._aside(trained), self._unheard(trained):
            while True:
                size = min(rows, self._rows_at_once or rows)
                try:
                    parts, total = self._step(inputs, size)
                    break
                except DoesNotFitError as error:
                    self._rows_at_once = halved(size, error, "a step", "; its gradients are those of the whole batch")
                # Out of `except`, which holds on to all that the attempt had made.
                self._graphs = None  # of batches that will not come again, with the memory of a pass each
                clear_device_cache(garbage_collection=True)
                for p in trained:
                    p.grad = None
                self.passes = passes
                rng.restore()
        if self.accelerator.sync_gradients and self.is_deepspeed_enabled:
            self._step_by_deepspeed()
        elif self.accelerator.sync_gradients:
            ranks.average_gradients(shards.whole(trained))
            shards.reshard(self.model)
        for name, value in (parts | self._adapt(parts)).items():
            self._logged[name].append(value.mean())
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return total * self._share

    def _prepare_input(self, data: Any) -> Any:
        """Trainer's, which would round pixels to the dtype of the weights under DeepSpeed."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _aside(self, trained: list[Tensor]) -> AbstractContextManager[None]:
        return nullcontext() if shards.is_sharded(self.model) else gradients_aside(trained)

    def _unheard(self, trained: list[Tensor]) -> AbstractContextManager[None]:
        return zero.without_hooks(trained) if self.is_deepspeed_enabled else nullcontext()

    def _step_by_deepspeed(self) -> None:
        """The optimizer step and that of the heads, which Trainer's own call then leaves out."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # DeepSpeed clips and steps at once, so `_clip_grad_norm` comes too late.
        norm = float(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        if ranks.any_of(not math.isfinite(norm)):
            self._refuse_divergence("gradient", math.nan, {"norm": torch.tensor(norm)})
        vision = [p for p in self.bridge.vision_parameters if p.requires_grad]
        if vision and not ranks.any_of(any(p.grad is not None for p in vision)):
            warnings.warn(
                f"no sample of step {self.state.global_step} has an image, and DeepSpeed still moves the vision side, "
                "by its momentum and weight decay. Mix samples with and without images, or train without DeepSpeed",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.heads is not None:
            ranks.average_gradients([p for p in self.heads.parameters() if p.requires_grad])
        zero.step(self.deepspeed, trained)
        if self._step_heads is not None:
            self._step_heads()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's; a non-finite gradient must not reach the weights, nor they a checkpoint."""
        norm = super()._clip_grad_norm(model)
        self._refuse_divergence("gradient", float(norm), {"norm": torch.as_tensor(norm)})
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the averages of the loss parts since the last log."""
        if "loss" in logs and self._logged:
            means = torch.stack([torch.stack(v).float().mean().to(self.args.device) for v in self._logged.values()])
            logs = {**logs, **dict(zip(self._logged, ranks.gather(means[None]).mean(0).tolist(), strict=True))}
            self._logged.clear()
        super().log(logs, start_time)
