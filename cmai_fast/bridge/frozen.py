"""Freezes a model for an attack and restores it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside: every module in evaluation mode, no parameter requires a gradient, autograd on.

    Afterwards, also after an exception, the mode of every module and `requires_grad` of every parameter are restored;
    `.grad` is never changed. Autograd is enabled inside, since attacks differentiate with respect to pixels and callers
    may be under `no_grad`.
    """
    parts = [m for root in modules if root is not None for m in root.modules()]
    parameters = [p for root in modules if root is not None for p in root.parameters()]
    modes = [m.training for m in parts]
    trainable = [p.requires_grad for p in parameters]
    try:
        # Set directly: `.eval()` and `.train()` recurse, and models override them.
        for m in parts:
            m.training = False
        for p in parameters:
            p.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for m, mode in zip(parts, modes, strict=True):
            m.training = mode
        for p, flag in zip(parameters, trainable, strict=True):
            p.requires_grad_(flag)
