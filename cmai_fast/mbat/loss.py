"""The outer loss of a step: how the samples' losses are reduced, as in `Trainer` or over samples.

`Trainer` divides the sum over all answer tokens of an optimizer step, its micro-batches and processes together, by
their number (`num_items_in_batch`). Here a sample's loss is the mean over its own tokens, as attacks need it, so it
is weighted by its share of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from cmai_fast.bridge import DualBridge, EncoderDecoderBridge, ModelBridge
from cmai_fast.bridge.labels import IGNORE

LossFunction = Callable[..., Tensor]


def target_counts(bridge: ModelBridge, labels: Tensor) -> Tensor:
    """The number of target tokens of each sample (N,); the first label of a decoder-only model is not a target."""
    if isinstance(bridge, DualBridge):
        return torch.ones_like(labels)
    first = 0 if isinstance(bridge, EncoderDecoderBridge) else 1
    return (labels[:, first:] != IGNORE).sum(1)


def sample_weights(
    bridge: ModelBridge, labels: Tensor, reduction: str, items: Tensor | int | None, batches: int, processes: int
) -> Tensor:
    """(N,) float64: the weights of these samples' losses in the loss of a step, times `batches`.

    Args:
        reduction: `tokens` or `samples`.
        items: tokens of all micro-batches (and processes) of the step, as `Trainer` counts them; None: it does not
            count them for this model; then the mean over micro-batches of each one's mean.
        batches: micro-batches of the step.
        processes: number of processes over which gradients are averaged and `items` was summed.
    """
    if reduction == "samples":
        return labels.new_full((len(labels),), 1 / len(labels), dtype=torch.float64)
    counts = target_counts(bridge, labels).double()
    if items is None:
        return counts / counts.sum()
    return counts * (batches * processes / items)


def smoothed_losses(bridge: ModelBridge, features: Tensor, text: Mapping[str, Tensor], smoothing: float) -> Tensor:
    """The losses of `Bridge.losses` (N,), with label smoothing over the vocabulary (`LabelSmoother`'s formula)."""
    logits, targets = bridge.fuse(features, **text)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return losses.sum(1) / (targets != IGNORE).sum(1)


def users_loss(
    function: LossFunction,
    bridge: ModelBridge,
    features: Tensor,
    text: Mapping[str, Tensor],
    items: Tensor | int | None,
) -> Tensor:
    """`compute_loss_func(outputs, labels, num_items_in_batch=...)` of the model's outputs at these image features, 0-d.

    `outputs.logits` has a column for every label, as in `Trainer`.
    """
    seen: list[Any] = []

    def every_column(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "logits_to_keep": 0} if "logits_to_keep" in kwargs else kwargs

    def keep(model: Any, args: Any, kwargs: Any, output: ModelOutput) -> None:
        seen.append(output)

    model = bridge.model
    hooks = (
        model.register_forward_pre_hook(every_column, with_kwargs=True),
        model.register_forward_hook(keep, with_kwargs=True),
    )
    try:
        _, targets = bridge.fuse(features, **text)
    finally:
        for hook in hooks:
            hook.remove()
    # An encoder-decoder's labels are those that its decoder has read.
    labels = targets if isinstance(bridge, EncoderDecoderBridge) else text["labels"]
    return function(seen[0], labels, num_items_in_batch=items)
