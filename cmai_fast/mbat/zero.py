"""Gradients and optimizer states sharded over processes by DeepSpeed (ZeRO stages 1 and 2).

DeepSpeed reduces gradients in hooks on the parameters, in the one backward pass of a loss that its engine's forward has
returned. A step of MBAT has several backward passes, through parts of the model. So they run without these hooks, and
the gradients of an optimizer step go through the engine in one pass of their own: that of sum(p * g) leaves g at p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients of `parameters` accumulate in `.grad`, and no hook hears of it."""
    hooks = [h for p in parameters if (h := p._post_accumulate_grad_hooks) is not None]
    before = [dict(h) for h in hooks]
    try:
        for h in hooks:
            h.clear()
        yield
    finally:
        for h, entries in zip(hooks, before, strict=True):
            h.update(entries)


def step(engine: Any, parameters: Sequence[Tensor]) -> None:
    """One step of the engine's optimizer, by the mean over processes of each `.grad`, clipped; `.grad` is None then.

    Every process hands over every parameter, with zeros where it has no gradient: buckets have to be the same in all.
    """
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None

    def of_gradients() -> Tensor:
        # The graph alone holds on to the gradients, and lets go of each as it is handed over.
        taken = (0.0 if g is None else g for g in (grads.pop() for _ in range(len(grads))))
        return torch.stack(
            [(p * g).sum(dtype=torch.float32) for p, g in zip(reversed(parameters), taken, strict=True)]
        ).sum()

    # Through the engine's own forward, which resets what it keeps of the last backward pass.
    model = engine.module
    before = model.__dict__.get("forward")
    model.forward = of_gradients
    try:
        loss = engine()
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss, scale_wrt_gas=False)
    engine.step()
