"""Gradients of each row's own loss, and their directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def differentiate(model: nn.Module, losses: Tensor, leaf: Tensor) -> Tensor:
    """d sum(losses) / d leaf, each row's from its own loss.

    Unscaled, in float16, 39% of the pixels of `easyvqa-llava` would have no gradient (62% with the immunised model),
    since it underflows (6e-8), the more so the surer the model is. So each loss is scaled up as far as the row's
    gradient stays finite.

    Raises:
        ValueError: the losses do not depend on `leaf` through anything differentiable.
    """
    if not losses.requires_grad:
        raise ValueError(
            f"no gradient of the loss reaches the image: {type(model).__name__} detaches it on the way (detach, "
            "no_grad, a copy to NumPy). An attack along gradients says nothing about such a model; use square, which "
            "needs none"
        )
    if all(p.dtype != torch.float16 for p in model.parameters()):
        return torch.autograd.grad(losses.sum(), leaf)[0]
    surety = torch.exp2(torch.log2(losses.detach().abs().clamp(2.0**-24, 1.0)).floor())
    found, rows = torch.empty_like(leaf), torch.ones_like(losses, dtype=torch.bool)
    for scale in (2.0**10 / surety, 2.0**4 / surety, torch.ones_like(surety)):
        (grad,) = torch.autograd.grad((losses * scale).sum(), leaf, retain_graph=True)
        found[rows] = (grad / scale.view(-1, *[1] * (leaf.dim() - 1)))[rows]
        rows = rows & ~grad.flatten(1).isfinite().all(1)
        if not rows.any():
            break
    return found


def unit(gradient: Tensor) -> Tensor:
    """Each row of (n, ...) divided by its L2 norm; a row of zeros stays."""
    norm = gradient.flatten(1).norm(dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    norm = norm.clamp_min(torch.finfo(norm.dtype).tiny).view(-1, *[1] * (gradient.dim() - 1))
    return (gradient / norm).to(gradient.dtype)
