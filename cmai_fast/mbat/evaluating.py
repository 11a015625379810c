"""Evaluation during training: the loop of `Trainer` with the verdicts of `robust_eval`, in parts if memory runs out."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from cmai_fast.attacks.words import Words
from cmai_fast.bridge import frozen
from cmai_fast.mbat import ranks, shards
from cmai_fast.mbat.batches import checked, no_features, rows_with_images
from cmai_fast.mbat.parts import OF_SAMPLES, DoesNotFitError, agreed, halved
from cmai_fast.mbat.robust_eval import on_words, untouched, verdicts
from cmai_fast.mbat.step import StepTrainer


class EvaluatingTrainer(StepTrainer):
    """Evaluation and prediction of `MBATTrainer`."""

    _looks_at_once: int | None = None  # set when memory ran out in an evaluation
    _verdicts: defaultdict[str, list[Tensor]] | None = None  # of the current evaluation
    _seen = 0

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, and the means of `robust_eval.verdicts` over samples, each counted once in distributed runs.

        Training is not affected: model and random state are restored. A metric of `compute_metrics` with one of these
        names takes precedence.
        """
        self._verdicts, self._seen = defaultdict(list), 0
        try:
            with untouched(self.model, self.args.device):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            means = {f"{metric_key_prefix}_{name}": _mean(name, parts) for name, parts in self._verdicts.items()}
        finally:
            self._verdicts = None
        name = f"{metric_key_prefix}_loss"
        ours = {name: means[name]} if name in means and self.compute_loss_func is None else {}
        return output._replace(metrics={**means, **(output.metrics or {}), **ours})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's; the loss of a batch with labels is its mean L_task, unless the user has a loss function."""
        inputs = self._prepare_inputs(inputs)
        loss = None
        if all(inputs.get(k) is not None for k in self.bridge.needs):
            inputs = checked(self.bridge, inputs, self._seen)
            self._seen += len(inputs["labels"]) * ranks.count()
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                found = self._look(inputs)
            if self.compute_loss_func is None:
                loss = found["loss"].mean()
            if self._verdicts is not None:
                for name, value in found.items():
                    self._verdicts[name].append(self._of_each_sample(value))
            if prediction_loss_only and loss is not None:
                return loss, None, None
        own = {k: v for k, v in inputs.items() if k != "sample_ids" and not k.startswith(OF_SAMPLES)}
        plain, logits, labels = super().prediction_step(model, own, prediction_loss_only, ignore_keys)
        return plain if loss is None else loss, _tensors_alone(logits), labels

    def _look(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`robust_eval.verdicts` (N,). Nothing can be done to a sample without an image: its robust values are the
        clean ones, and it has no S_c (NaN). Where memory runs out it is done in parts, as a step is."""
        there = rows_with_images(self.bridge, inputs)
        while True:
            size = min(len(there), self._looks_at_once or len(there))
            try:
                looks = self._looks(inputs, size)
                break
            except DoesNotFitError as error:
                self._looks_at_once = halved(size, error, "an evaluation")
            clear_device_cache(garbage_collection=True)
        order = torch.cat([there.nonzero().squeeze(1), (~there).nonzero().squeeze(1)])
        nothing = [torch.full_like(look["loss"], float("nan")) for look in looks]
        found = {}
        for name in dict.fromkeys(name for look in looks for name in look):
            value = torch.cat([look.get(name, nan).to(nan) for look, nan in zip(looks, nothing, strict=True)])
            found[name] = torch.empty_like(value).index_copy_(0, order, value)
        return found

    def _looks(self, inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        run = lambda: [self._look_at(batch) for batch in self._batches(inputs, size)[1]]  # noqa: E731
        sharded = shards.is_sharded(self.model)
        return shards.whole_or_not(run, "A sharded model's evaluation") if sharded else agreed(run)

    def _look_at(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "pixel_values" not in inputs:
            _, text = self.bridge.inputs(inputs)
            features, steps = no_features(self.bridge, text), self.args.eval_attack_steps
            with frozen(self.model), torch.no_grad():
                loss, right = self.bridge.losses(features, **text)
            found = {"loss": loss, "accuracy": right.to(loss)}
            if steps and self.args.words is not None:
                return found | on_words(Words(self.bridge, text, self.args.words), features, steps)
            return found | ({f"robust_{name}": value for name, value in found.items()} if steps else {})
        return verdicts(
            self._victim(inputs), self.args.threat, self.args.eval_attack_steps,
            seed=self.args.seed, sample_ids=inputs["sample_ids"], words=self.args.words,
            images=self.args.modality != "text",
        )  # fmt: skip

    def _of_each_sample(self, rows: Tensor) -> Tensor:
        """(n,) of each process to those of all, on the CPU, without the padding of the last batch."""
        state = self.accelerator.gradient_state
        if ranks.count() > 1 and state.end_of_dataloader and state.remainder < 0 and not self.args.dataloader_drop_last:
            raise ValueError(
                "the evaluation data have no length, so samples that pad the last batch of several processes "
                "cannot be distinguished from the others; give a dataset with __len__, or set dataloader_drop_last"
            )
        return self.accelerator.gather_for_metrics(rows).cpu()


def _tensors_alone(outputs: Any) -> Any:
    """The outputs that can be gathered: from transformers 5.24 on, Trainer leaves the cache of keys and values among
    them and fails on it."""
    if not isinstance(outputs, tuple):
        return outputs
    kept = tuple(value for value in outputs if _of_tensors(value))
    return kept[0] if len(kept) == 1 else kept


def _of_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_of_tensors, value))
    return isinstance(value, Tensor)


def _mean(name: str, parts: list[Tensor]) -> float:
    values = torch.cat(parts).double()
    return float(values.nanmean() if name.endswith("s_c") else values.mean())
