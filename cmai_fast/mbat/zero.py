"""Optimizer states sharded over processes by DeepSpeed (ZeRO stages 1 and 2).

DeepSpeed reduces gradients in hooks on the parameters, in the one backward pass of a loss that its engine's forward
returned. A step of MBAT has several backward passes, of parts of the model. They run without these hooks, and the
gradients of an optimizer step go through the engine in one pass of their own: that of sum(p * g) leaves g at p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, backward passes only add to `.grad` of `parameters`: what was registered by
    `register_post_accumulate_grad_hook` does not run."""
    hooks = [h for p in parameters if (h := p._post_accumulate_grad_hooks)]
    before = [dict(h) for h in hooks]
    try:
        for h in hooks:
            h.clear()
        yield
    finally:
        for h, entries in zip(hooks, before, strict=True):
            h.update(entries)


def step(engine: Any, parameters: Sequence[Tensor]) -> None:
    """One step of the engine's optimizer by the mean of each `.grad` over all processes, clipped by the engine.

    Every parameter is handed over, with a gradient of zero where this process has none: the processes reduce theirs in
    buckets, which have to be the same in all.
    """
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None

    def of_gradients() -> Tensor:
        terms = [
            (p * (0.0 if g is None else g)).sum(dtype=torch.float32) for p, g in zip(parameters, grads, strict=True)
        ]
        grads.clear()  # the graph alone holds them now, and frees each one as soon as it is handed over
        return torch.stack(terms).sum()

    # Through the engine's forward, which clears what is left of the last pass.
    model, own = engine.module, engine.module.__dict__.get("forward")
    model.forward = of_gradients
    try:
        loss = engine()
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss, scale_wrt_gas=False)
    engine.step()
