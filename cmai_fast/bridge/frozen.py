"""Lend a model to an attack and get it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside: every module in evaluation mode, no parameter requires a gradient, autograd on.

    On leaving, also by an exception, the mode of every single module and `requires_grad` of every parameter are what
    they were; `.grad` is never touched. Autograd is switched on inside, because attacks differentiate with respect to
    pixels and callers may sit under `no_grad`.
    """
    parts = [m for root in modules if root is not None for m in root.modules()]
    parameters = [p for root in modules if root is not None for p in root.parameters()]
    modes = [m.training for m in parts]
    trainable = [p.requires_grad for p in parameters]
    try:
        # Attribute by attribute: `.eval()` and `.train()` recurse, and models override them.
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
