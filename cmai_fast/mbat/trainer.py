"""MBATTrainer: a `transformers.Trainer` whose step is adversarial."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from cmai_fast.arm import ARMSchedule
from cmai_fast.attacks import Passes, Victim
from cmai_fast.bridge import BatchImages, DualBridge, bridge_of, frozen, lean_activations, set_recompute, unpack
from cmai_fast.cmcv import ConsistencyHeads, contrastive_loss, packed_text, same_text
from cmai_fast.data.collate import negative_texts
from cmai_fast.mbat import ranks, shards
from cmai_fast.mbat.adapters import (
    adapter_parameters,
    check_adapters_learn,
    check_saving,
    has_adapters,
    low_rank_parameters,
)
from cmai_fast.mbat.checkpoints import CheckpointedTrainer
from cmai_fast.mbat.config import MBATConfig
from cmai_fast.mbat.inner import InnerResult, maximise
from cmai_fast.mbat.muon import MuonAdamW, hidden_matrices
from cmai_fast.mbat.parts import DoesNotFitError, Draws, Part, View, agreed, cut, gradients_aside
from cmai_fast.mbat.quantized import check_vision_side, freeze_language_model, is_quantized, trainable_in_part
from cmai_fast.mbat.robust_eval import untouched, verdicts
from cmai_fast.threat import PixelSpace, ThreatModel


class MBATTrainer(CheckpointedTrainer):
    """Drop-in for `Trainer`: the same arguments, plus `heads`.

    Args:
        model: as for `Trainer`; one that `bridge_of` supports.
        args: an `MBATConfig`.
        processing_class: the model's processor; its mean and std turn `eps` into the model's input space.
        heads: consistency heads to go on with; None makes new ones when beta or gamma needs them.
        Everything else is `Trainer`'s own.

    Batches are what the model's own forward takes: for a generative model `pixel_values`, `input_ids`,
    `attention_mask`, `labels` and what else its family needs. `sample_ids` (N,) names samples for their random starts,
    `negative_input_ids`, `negative_attention_mask`, `negative_labels` (N, K, M) are wrong answers for the contrastive loss
    (`cmai_fast.data.VQACollator` makes them all).

    Under `torchrun` or `accelerate launch` each process has a copy of the model, and the step is that of one process
    with the whole batch. With FSDP2 (`MBATConfig(fsdp=True)`) each has a part of the model; FSDP1 and DeepSpeed raise
    ValueError.

    `evaluate` and `eval_strategy` report, besides what `Trainer` does, the means over samples of L_task (`eval_loss`,
    `eval_robust_loss`), of right answers (`eval_accuracy`, `eval_robust_accuracy`) and, with heads, of S_c (`eval_s_c`,
    `eval_robust_s_c`): clean, and under PGD at the full `eps` (`MBATConfig.eval_attack_steps`).

    Of a model with adapters (PEFT's LoRA, by `add_adapter` or `get_peft_model`) the adapters are saved, alone; anything
    else that is trainable raises ValueError.

    Checkpoints hold the heads (`cmcv/`), ARM's state and the passes so far (`mbat.json`) and, written last, the file
    `complete`; see `last_checkpoint`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MBATConfig | None = None,
        *,
        heads: ConsistencyHeads | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MBATConfig):
            raise TypeError(f"args is a {type(args).__name__}; MBATTrainer takes an MBATConfig")
        processor = kwargs.get("processing_class")
        if processor is None:
            raise ValueError("processing_class is None; MBATTrainer needs the model's processor for its mean and std")
        if model is None:
            raise ValueError("model is None; MBATTrainer needs the model itself, not model_init")
        if args.muon and ((kwargs.get("optimizers") or [None])[0] or kwargs.get("optimizer_cls_and_kwargs")):
            raise ValueError("muon is set and an optimizer is given; expected one of the two")
        self.bridge = bridge_of(model)
        self.space = PixelSpace.from_processor(processor)
        if heads is None and (args.beta or args.gamma or args.arm):
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                heads = ConsistencyHeads(self.bridge.image_dim, self.bridge.text_dim)
        self.heads = heads
        self.schedule = (
            ARMSchedule(args.tau_train, args.beta, max(args.beta, args.beta_max), args.beta_step)
            if args.arm and heads is not None
            else None
        )
        self.passes = Passes()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._steps_in_sums = 0
        self._rows_at_once: int | None = None  # where memory ran out
        self._heads_optimizer: torch.optim.Optimizer | None = None  # where the model is sharded
        self._verdicts: defaultdict[str, list[Tensor]] | None = None  # of the evaluation that is under way
        self._seen = 0
        check_adapters_learn(model)
        if args.trainable == "vision":
            _train_only(model, self.bridge.vision_parameters)
        if is_quantized(model):
            freeze_language_model(self.bridge, adapter_parameters(model))
            unpack(model)  # for good: evaluation in mid-training would round the weights a little
            if not has_adapters(model):
                check_vision_side(self.bridge)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient, so there is nothing to train; "
                "requires_grad_() sets what is frozen free, is_trainable=True an adapter that is loaded"
            )
        if any(p.dtype == torch.float16 for p in model.parameters()):
            raise ValueError(
                "weights of the model are in float16, in which the bridge gradient underflows; load it with "
                "dtype=torch.bfloat16 or torch.float32"
            )
        set_recompute(model, self.bridge.vision_side, args.recompute)
        with trainable_in_part(model):
            super().__init__(model=model, args=args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.is_distributed_loading_by_transformers:
            self._check_sharding()
        # The loss of a step is a mean over samples, whatever the model does with `num_items_in_batch`.
        self.model_accepts_loss_kwargs = False
        if self.heads is not None:
            self.heads.to(args.device)
            ranks.copy_from_first(self.heads.parameters())

    def _check_sharding(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed is asked for; under accelerate its optimizer steps at the end of a backward pass, and a "
                "step of MBATTrainer has two. Shard the model by FSDP2 instead: MBATConfig(fsdp=True)"
            )
        if self.is_distributed_loading_by_transformers:
            raise ValueError(
                "the model was loaded in parts (distributed_config); load it whole, and MBATConfig(fsdp=True) shards it"
            )
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"FSDP{plugin.fsdp_version} is asked for; MBATTrainer runs parts of the model past its forward, which "
                "FSDP2 alone allows. Set fsdp_config={'version': 2}, or fsdp_version: 2 for accelerate launch"
            )
        if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise ValueError(
                f"fsdp's state_dict_type is {plugin.state_dict_type}, with which no plain model would be saved; "
                "expected FULL_STATE_DICT"
            )
        if self.args.muon or is_quantized(self.model):
            what = "muon is set" if self.args.muon else "the model is quantised"
            raise ValueError(f"{what}, and the model is to be sharded by FSDP2; expected one of the two")
        if self.bridge.model is not self.model:
            raise ValueError(
                f"a {type(self.model).__name__} is to be sharded by FSDP2, whose wrapper the parts of the model do not "
                "run through; put the adapters in by model.add_adapter(config) instead of get_peft_model"
            )
        if isinstance(self.bridge, DualBridge):
            raise ValueError(
                f"{type(self.model).__name__} is to be sharded by FSDP2, but accelerate cannot shard dual encoders; "
                "leave fsdp out (each process then has a copy)"
            )
        if plugin.transformer_cls_names_to_wrap is None:
            # Accelerate asks for all of `_no_split_modules`; LLaVA's names layers of CLIP's text side, which it lacks.
            there = {type(m).__name__ for m in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(there & set(getattr(self.model, "_no_split_modules", ())))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        shards.run_through_root(self.bridge)
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, or `MuonAdamW`, with the heads as a parameter group of their own."""
        # Not sooner: users free parameters between making the trainer and train().
        check_saving(self.model, Path(self.args.output_dir))
        if self.args.muon and self.optimizer is None:
            self.optimizer = self._muon(self.model if model is None else model)
        optimizer = super().create_optimizer(model)
        if self.heads is None or not self.args.gamma:
            return optimizer
        heads = list(self.heads.parameters())
        if self.is_fsdp_enabled:
            self._step_heads_after(optimizer, self.heads)
            return optimizer
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not known & {id(p) for p in heads}:
            optimizer.add_param_group({"params": heads, "lr": self.args.heads_learning_rate, "weight_decay": 0.0})
            # Trainer clears the gradients of its model alone; those of the heads would add up over all of training.
            optimizer.register_step_post_hook(lambda *_: self.heads.zero_grad())
        return optimizer

    def _step_heads_after(self, optimizer: torch.optim.Optimizer, heads: ConsistencyHeads) -> None:
        """Gives the heads an optimizer of their own, of the same kind, that steps behind `optimizer` at its schedule.

        What is sharded and what each process has whole cannot stand in one: FSDP2 knows the model's parameters alone.
        """
        if self._heads_optimizer is not None:
            return
        kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        group = {"params": list(heads.parameters()), "lr": self.args.heads_learning_rate, "weight_decay": 0.0}
        own = self._heads_optimizer = kind([group], **settings)
        start = optimizer.param_groups[0]["lr"]

        def step(stepped: torch.optim.Optimizer, *_: Any) -> None:
            for group in own.param_groups:
                group["lr"] = self.args.heads_learning_rate * stepped.param_groups[0]["lr"] / start
            own.step()
            own.zero_grad()

        optimizer.register_step_post_hook(step)

    def _muon(self, model: nn.Module) -> torch.optim.Optimizer:
        args, decayed = self.args, set(self.get_decay_parameter_names(model))
        # Muon is for a weight's own update: two orthogonal updates of LoRA's factors do not make one of their product.
        matrices = set(hidden_matrices(model)) - low_rank_parameters(model)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups[p in matrices, name in decayed].append(p)

        def parameter_groups(muon: bool) -> list[dict[str, Any]]:
            return [
                {"params": groups[muon, decay], "weight_decay": args.weight_decay if decay else 0.0}
                for decay in (True, False)
            ]

        return MuonAdamW(
            parameter_groups(True),
            parameter_groups(False),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One MBAT step; returns the total loss, 0-d, detached.

        The language side reads h_v as a leaf and goes backward to it: that gives the language model its gradients, and
        p, the bridge gradient, in one go. The vision side then goes backward once, for all that has gathered at h_v.

        Where memory runs out the step is done again in two halves, or more, and so are the next ones; gradients are
        those of the whole batch. That costs a second pass of the vision side. With a sharded model, or when a single
        sample does not fit, torch.OutOfMemoryError says what else helps.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        rows = len(inputs["labels"])
        ranks.check_equal(rows)
        inputs.setdefault("sample_ids", ranks.row_numbers(rows))
        trained = [*self.model.parameters(), *(self.heads.parameters() if self.heads is not None else [])]
        trained = [p for p in trained if p.requires_grad]
        passes, draws = self.passes, Draws(self.args.device)
        # Lean around the backward passes too: what they compute again must be what ran.
        with lean_activations(self.bridge.model), self._aside(trained):
            while True:
                size = min(rows, self._rows_at_once or rows)
                try:
                    parts, total = self._step(inputs, size)
                    break
                except DoesNotFitError as error:
                    self._halve(size, error)
                # Out of `except`, which holds on to all that the attempt had made.
                clear_device_cache(garbage_collection=True)
                for p in trained:
                    p.grad = None
                self.passes = passes
                draws.again()
        if self.accelerator.sync_gradients:
            ranks.average_gradients(shards.whole(trained))
            shards.reshard(self.model)
        if self.schedule is not None and "s_c_adv" in parts and self.args.inner != "none":
            self.schedule.update(ranks.gather(parts["s_c_adv"]))
            parts["beta"] = torch.tensor(self.schedule.beta)
        self._record({name: value.mean() for name, value in parts.items()})
        return total * self._share

    @property
    def _share(self) -> float:
        """Of a batch in the gradients of an optimizer's step."""
        return 1 / getattr(self, "current_gradient_accumulation_steps", 1)  # unset outside of train()

    def _aside(self, trained: list[Tensor]) -> AbstractContextManager[None]:
        return nullcontext() if shards.is_sharded(self.model) else gradients_aside(trained)

    def _halve(self, size: int, error: DoesNotFitError) -> None:
        if size == 1:
            raise torch.OutOfMemoryError(
                f"a single sample does not fit into memory ({error}). Set recompute='full', load the language model in "
                "4 bits (quantized_language_model), or let the processor make smaller images"
            ) from error
        self._rows_at_once = (size + 1) // 2
        warnings.warn(
            f"{size} samples at once do not fit into memory ({error}). From now on a step takes at most "
            f"{self._rows_at_once} at once; its gradients are those of the whole batch",
            RuntimeWarning,
            stacklevel=3,
        )

    def _step(self, inputs: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss, by name, and the total, detached; gradients are left in place. At most `size` samples
        at once."""
        args, count = self.args, len(inputs["labels"])
        together = shards.whole_or_not if shards.is_sharded(self.model) else agreed
        # Autocast is accelerate's wrapper of the model's `forward`, which the parts of a model do not go through.
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            whole = size >= count
            batches = [inputs] if whole else cut(BatchImages(self.bridge, self.space, inputs), inputs, size)
            parts = together(lambda: [self._language_side(b, len(b["labels"]) / count, keep=whole) for b in batches])
            found = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
            if self.heads is not None:
                found["loss_contrastive"], found["s_c_adv"] = self._contrast(parts, self.bridge.inputs(inputs)[1])
        weights = {"loss_clean": 1 - args.lam if args.inner != "none" else 1.0, "loss_adv": args.lam}
        weights["loss_contrastive"] = args.gamma
        total = torch.stack([weights[k] * v for k, v in found.items() if k in weights]).sum()
        self._refuse_divergence("loss", float(total), {k: float(v.mean()) for k, v in found.items()})
        together(lambda: self._vision_side(parts))
        return found, total

    def _language_side(self, inputs: dict[str, Tensor], share: float, *, keep: bool) -> Part:
        """The clean branch, the attack and the adversarial branch, whose gradients it leaves at the language model and
        at the leaves of the views. `share` of these samples in the batch; `keep`: the vision side's graph."""
        args, (image, text) = self.args, self.bridge.inputs(inputs)
        clean = View.of(lambda: self.bridge.encode_image(inputs["pixel_values"], **image), args.device, keep=keep)
        loss, p = self._clean_branch(clean.leaf, text, share * self._share)
        part = Part(text, [clean], *self._read_texts(inputs, text), {"loss_clean": share * loss})
        if args.inner == "none":
            return part
        heads = self.heads if self.beta else None
        victim = Victim(self.bridge, self.space, inputs, heads, part.own)
        result = self._attack(victim, inputs["sample_ids"], p)
        model_input = result.model_input.to(clean.leaf.dtype)
        adversarial = View.of(lambda: victim.encode(model_input), args.device, keep=keep)
        part.views.append(adversarial)
        with torch.set_grad_enabled(args.lam > 0):
            loss = self.bridge.losses(adversarial.leaf, **text)[0].mean()
        self._count(full_forward=1, full_backward=1)
        if args.lam:
            self.accelerator.backward(share * self._share * args.lam * loss)
        part.sums |= {"loss_adv": share * loss.detach(), "nonfinite_gradients": result.nonfinite.sum().float()}
        part.sums["zero_gradients"] = result.zero_gradients.sum().float()
        return part

    def _vision_side(self, parts: list[Part]) -> None:
        for part in parts:
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                remainder = torch.stack([view.pulled_back() for view in part.views]).sum()
            self._count(vision_forward=sum(view.features is None for view in part.views))
            if remainder.requires_grad:
                self.accelerator.backward(remainder)

    def _clean_branch(self, leaf: Tensor, text: dict[str, Tensor], share: float) -> tuple[Tensor, Tensor | None]:
        """L_task of the clean images (0-d, detached) and p per sample, (N, T, D) or None where no solver asks for it.

        Leaves the gradients of the language model in place, and that of the bridge in `leaf.grad`.
        """
        args = self.args
        weight = 1 - args.lam if args.inner != "none" else 1.0
        wants_p = args.inner == "bridge" and args.refreshes < args.inner_steps
        if not weight and not wants_p:
            with torch.no_grad():
                return self.bridge.losses(leaf, **text)[0].mean(), None
        loss = self.bridge.losses(leaf, **text)[0].mean()
        self._count(full_forward=1, full_backward=1)
        if weight:
            self.accelerator.backward(share * weight * loss)
            assert leaf.grad is not None
            p = leaf.grad * (len(leaf) / (share * weight))
        else:
            (p,) = torch.autograd.grad(loss * len(leaf), leaf)
        return loss.detach(), p if wants_p else None

    def _read_texts(self, inputs: dict[str, Tensor], text: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """h_t of the texts (N, text_dim) and of their wrong answers (N * K, text_dim); None where nothing asks for it.

        Read once a step, in evaluation mode, for the attack and the contrastive loss.
        """
        if self.heads is None:
            return None, None
        wrong = negative_texts(inputs, text) if self.args.gamma else {}
        with frozen(self.bridge.model), torch.no_grad():
            own = self.bridge.encode_text(**text)
            other = self.bridge.encode_text(**wrong) if wrong else None
        self._count(text_forward=1 + bool(wrong))
        return own, other

    def _attack(self, victim: Victim, sample_ids: Tensor, p: Tensor | None) -> InnerResult:
        """Adversarial images, made on the model as it is now, in evaluation mode."""
        args = self.args
        with shards.quiet(self.model):
            result = maximise(
                victim,
                victim.pixels(),
                ThreatModel(args.threat.norm, args.eps * self._eps_share()),
                args.inner,
                alpha=args.alpha,
                beta=self.beta,
                steps=args.inner_steps,
                step_size=args.inner_step_size,
                refreshes=args.refreshes,
                bridge_gradient=p,
                seed=args.seed + 7_919 * self.state.global_step,
                sample_ids=sample_ids,
            )
        self.passes = self.passes + result.passes
        return result

    @property
    def beta(self) -> float:
        """The weight of S_c in the next inner problem."""
        return self.args.beta if self.schedule is None else self.schedule.beta

    def _eps_share(self) -> float:
        """The part of eps in force: a linear warm-up over `eps_warmup` of all steps."""
        warmup = self.args.eps_warmup * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / warmup) if warmup >= 1 else 1.0

    def _contrast(self, parts: list[Part], text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L_contrastive over clean and adversarial images (0-d), and S_c (N,) of the latter, detached.

        Its gradients are left at the heads and at the leaves of all views. `text` is that of the whole batch.

        The text side of the model (`own`, `wrong`) is read but not trained by this loss: its gradient would cost a
        second pass of the language model for each wrong answer. Of several processes each computes the loss of the
        whole batch: the samples of the others are negatives too.
        """
        assert self.heads is not None
        heads, weight = self.heads, self._share * self.args.gamma
        with torch.set_grad_enabled(weight > 0):
            t = torch.cat([heads.project_text(part.own) for part in parts if part.own is not None])
            wrong = [heads.project_text(part.wrong) for part in parts if part.wrong is not None]
            t_wrong = ranks.gather(torch.cat(wrong)) if wrong else None
            same = same_text(ranks.gather_ragged(packed_text(*self.bridge.own_texts(text)), -1))
            tokens = [self.bridge.image_tokens(part.texts) for part in parts]
            projected = [
                torch.cat([heads.project_image(view.leaf, n) for view, n in zip(views, tokens, strict=True)])
                for views in zip(*(part.views for part in parts), strict=True)
            ]
            every_t = ranks.gather(t)
            losses = [contrastive_loss(heads, ranks.gather(v), every_t, t_wrong, same_text=same) for v in projected]
            loss = torch.stack(losses).mean()
        if weight:
            self.accelerator.backward(weight * loss)
        return loss.detach(), heads.score(projected[-1], t).detach()

    def _count(self, **passes: int) -> None:
        self.passes = self.passes + Passes(**passes)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's; a gradient that is not finite must not reach the weights, nor these a checkpoint."""
        norm = super()._clip_grad_norm(model)
        self._refuse_divergence("gradient", float(norm), {"norm": float(norm)})
        return norm

    def _refuse_divergence(self, what: str, value: float, values: dict[str, float]) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is not finite at step {self.state.global_step}: {values}. Lower the learning rate, or "
                "look for images or labels that are not as the model expects; the last checkpoint is intact"
            )

    def _record(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self._sums[name] += float(value)
        self._steps_in_sums += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the parts of the loss averaged since the last one."""
        if "loss" in logs and self._steps_in_sums:
            means = torch.tensor([v / self._steps_in_sums for v in self._sums.values()], device=self.args.device)
            logs = {**logs, **dict(zip(self._sums, ranks.gather(means[None]).mean(0).tolist(), strict=True))}
            self._sums.clear()
            self._steps_in_sums = 0
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, and the means of `robust_eval.verdicts` over samples, each counted once whatever process has it.

        Nothing of it reaches training: model and random state are as they were. A metric that `compute_metrics` returns
        under one of these names stands.
        """
        self._verdicts, self._seen = defaultdict(list), 0
        try:
            with untouched(self.model, self.args.device):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            means = {
                f"{metric_key_prefix}_{name}": float(torch.cat(parts).double().mean())
                for name, parts in self._verdicts.items()
            }
        finally:
            self._verdicts = None
        loss = {k: v for k, v in means.items() if k == f"{metric_key_prefix}_loss"}
        return output._replace(metrics={**means, **(output.metrics or {}), **loss})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's; the loss of a batch that can be trained on is its mean L_task, as `loss_clean` of training is."""
        inputs = self._prepare_inputs(inputs)
        loss = None
        if all(inputs.get(k) is not None for k in ("pixel_values", *self.bridge.needs)):
            rows = len(inputs["labels"])
            places = self._seen + ranks.row_numbers(rows)
            self._seen += rows * ranks.count()
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                found = verdicts(
                    self.bridge, self.space, inputs, self.heads, self.args.threat, self.args.eval_attack_steps,
                    seed=self.args.seed, sample_ids=inputs.get("sample_ids", places.to(self.args.device)),
                )  # fmt: skip
            loss = found["loss"].mean()
            if self._verdicts is not None:
                for name, value in found.items():
                    self._verdicts[name].append(self._of_each_sample(value))
            if prediction_loss_only:
                return loss, None, None
        own = {k: v for k, v in inputs.items() if k != "sample_ids" and not k.startswith("negative_")}
        plain, logits, labels = super().prediction_step(model, own, prediction_loss_only, ignore_keys)
        return plain if loss is None else loss, logits, labels

    def _of_each_sample(self, rows: Tensor) -> Tensor:
        """(n,) of each process to those of all, on the CPU, without what fills up the last batch."""
        state = self.accelerator.gradient_state
        if ranks.count() > 1 and state.end_of_dataloader and state.remainder < 0 and not self.args.dataloader_drop_last:
            raise ValueError(
                "the evaluation data have no length, so samples that fill up the last batch of several processes "
                "cannot be told from the others; give a dataset with __len__, or set dataloader_drop_last"
            )
        return self.accelerator.gather_for_metrics(rows).cpu()


def _train_only(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """`parameters` learn and nothing else; beside adapters, those of them that already did."""
    keep = set(parameters)
    if has_adapters(model):
        keep = {p for p in keep if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(p in keep)
