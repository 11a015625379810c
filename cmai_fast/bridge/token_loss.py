"""The cross-entropy of tokens from the last hidden state, without ever holding the logits of them all.

A vocabulary of 152k words makes 0.6 MB of float32 logits a token, and the loss keeps them several times. Here tokens
go through the output layer in chunks. Where it is frozen, as in an attack, the gradient at the hidden state is taken on
the way: token i's gradient is a multiple of that of its own loss. Where it is trained, a chunk's logits are computed
again in the backward pass, since the gradient of the layer weighs tokens by what is yet to come.

PyTorch has `linear_cross_entropy` from 2.13 on, liger-kernel a fused one for GPUs: both read the bare weights of a
layer, and for the loss of each token both compute the logits twice, where a frozen layer needs them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 1 << 14  # words


def token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (T,) of each token, float32 or better, and whether its target is the most likely one, (T,) bool.

    Args:
        head: the output layer, (n, d) to logits (n, V): linear or not, quantised, with adapters; without dropout.
        hidden: (T, d), what it reads.
        targets: (T,) int64, each in [0, V).
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    return _TokenLosses.apply(hidden, targets, head, *trained)


@contextmanager
def lent(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the output layer of a model does this instead of its own work."""
    own = head.__dict__.get("forward")  # somebody else's hook, such as accelerate's
    try:
        head.forward = forward
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _chunk(hidden: Tensor) -> int:
    # The logits of a chunk then take an eighth of what the weights of the layer do.
    return max(16, hidden.shape[1] // 8)


def _losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.to(logits.device), reduction="none"), logits


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, *trained: Tensor) -> tuple[Tensor, Tensor]:
        on_the_way = ctx.needs_input_grad[0] and not trained
        losses, right, grads = [], [], []
        for h, t in zip(hidden.split(_chunk(hidden)), targets.split(_chunk(hidden)), strict=True):
            with torch.set_grad_enabled(on_the_way):
                h = h.detach().requires_grad_(on_the_way)
                loss, logits = _losses(head, h, t)
                if on_the_way:
                    grads += torch.autograd.grad(loss.sum(), h)
            losses.append(loss.detach())
            right.append(logits.argmax(-1) == t.to(logits.device))
            del loss, logits  # before the next chunk's
        device = hidden.device.type
        ctx.head, ctx.trained = head, bool(trained)
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(*((hidden, targets, *trained) if trained else grads))
        every_right = torch.cat(right)
        ctx.mark_non_differentiable(every_right)
        return torch.cat(losses), every_right

    @staticmethod
    def backward(ctx: Any, weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            grads = ctx.saved_tensors
            parts = [g * w.unsqueeze(1).to(g) for g, w in zip(grads, weights.split(len(grads[0])), strict=True)]
            return torch.cat(parts), None, None
        hidden, targets, *trained = ctx.saved_tensors
        matrix = _matrix(ctx.head)
        others = [p for p in trained if p is not matrix]
        # A sum of many chunks in bfloat16 would lose more than the one product of the plain path.
        parts, sums = [], {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained}
        for h, t, w in zip(*(x.split(_chunk(hidden)) for x in (hidden, targets, weights)), strict=True):
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                h = h.detach().requires_grad_()
                loss, logits = _losses(ctx.head, h, t)
                of_logits, grad, *rest = torch.autograd.grad((loss * w).sum(), [logits, h, *others])
            del loss, logits
            parts.append(grad)
            for p, one in zip(others, rest, strict=True):
                sums[p] += one
            if matrix is not None:
                # By blocks of words: a gradient of the whole matrix beside the sum would double its memory.
                for total, one in zip(sums[matrix].split(_BLOCK), of_logits.t().split(_BLOCK), strict=True):
                    total += one @ h.detach().to(one)
        # Popped, so that they become `.grad` themselves and not copies of it.
        return torch.cat(parts), None, None, *(sums.pop(p).to(p.dtype) for p in trained)


def _matrix(head: nn.Module) -> Tensor | None:
    """The trained W where the layer is h W^T + b and nothing else."""
    hooked = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks
    plain = type(head) is nn.Linear and not hooked and head.weight.requires_grad
    return head.weight if plain else None  # type: ignore[return-value]
