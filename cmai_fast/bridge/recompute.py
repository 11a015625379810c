"""Recomputes activations in the backward pass instead of storing them (Chen et al. 2016), in attacks too.

`transformers` recomputes a layer only in training mode, but attacks need evaluation mode, in which dropout is off and
batch statistics are fixed. `recomputed` gives layers with recomputation a `forward` that recomputes in any mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from cmai_fast.bridge.replaced import replaced

MODES = ("none", "encoder", "selective", "full")

# What `selective` stores: products and attention take nearly all of a layer's time and little of its memory.
_KEPT = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product", "flash_attn", "bitsandbytes")


def set_recompute(model: nn.Module, vision_side: Sequence[nn.Module], mode: str) -> None:
    """Enables recomputation permanently, layer by layer.

    Args:
        mode: "none" leaves the model as it is; "encoder": the layers of `vision_side`; "full": all layers; "selective":
            all layers, but outputs of matrix products (also quantised) and of attention are stored.

    Raises:
        ValueError: an unknown mode, or a model without layers that can be recomputed.
    """
    if mode not in MODES:
        raise ValueError(f"recompute is {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "none":
        return
    roots = vision_side if mode == "encoder" else [model]
    layers = [m for root in roots for m in root.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"recompute is {mode!r}, but {type(model).__name__} has no layers there that transformers can recompute; "
            "set it to none"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, **options)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    space, _, name = operator.name().partition("::")
    kept = space == "bitsandbytes" or any(name.split(".")[0] == k or name.startswith(k) for k in _KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, layers with recomputation enabled recompute in evaluation mode too; they are restored afterwards."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    with replaced({layer: functools.partial(_forward, layer, layer.forward) for layer in layers}):
        yield


def _forward(layer: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if layer.training or not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    # The reentrant variant, which a user may have chosen, gives no gradient with respect to pixels. Nothing is random
    # in evaluation mode, so the RNG state need not be stored.
    chosen = getattr(layer._gradient_checkpointing_func, "keywords", {})
    options = {"context_fn": chosen["context_fn"]} if "context_fn" in chosen else {}
    return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)
