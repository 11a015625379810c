"""The cross-entropy of tokens from the last hidden state, without storing all logits.

A vocabulary of 152k words makes 0.6 MB of float32 logits per token, and the loss stores several copies. Here tokens go
through the output layer in chunks. If it is frozen, as in an attack, the gradient at the hidden state is computed in
the forward pass: a token's gradient is a multiple of that of its own loss. If it is trained, a chunk's logits are
recomputed in the backward pass, since the gradient of the layer needs the weights of the tokens, which are known only
then.

PyTorch has `linear_cross_entropy` from 2.13 on, liger-kernel a fused one for GPUs: both read the bare weights of a
layer, and both compute the logits twice for per-token losses, where a frozen layer needs them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 1 << 14  # words


def token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (T,) of each token, float32 or better, and whether its target is the most likely one, (T,) bool.

    Args:
        head: the output layer, (n, d) to logits (n, V): linear or not, quantised, with adapters; without dropout.
        hidden: (T, d), its input.
        targets: (T,) int64, each in [0, V).
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    return _TokenLosses.apply(hidden, targets, head, *trained)


def _chunk(hidden: Tensor) -> int:
    # The logits of a chunk then take an eighth of the memory of the layer's weights.
    return max(16, hidden.shape[1] // 8)


def _losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits with their graph, and without a graph, in float32 or better: their logsumexp (n, 1), the losses (n,), and
    which tokens are right."""
    logits = head(hidden)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    own = targets.to(logits.device)
    total = wide.logsumexp(-1, keepdim=True)
    losses = (total - wide.gather(-1, own.unsqueeze(-1))).squeeze(-1)
    return logits, total, losses, wide.argmax(-1) == own


def _slopes(logits: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    """The gradient of each token's loss at its logits: softmax, less 1 at the target. Float32 or better."""
    slopes = (logits.detach() - total).exp_()
    own = targets.to(logits.device).unsqueeze(-1)
    return slopes.scatter_add_(-1, own, torch.full_like(total, -1))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, *trained: Tensor) -> tuple[Tensor, Tensor]:
        on_the_way = ctx.needs_input_grad[0] and not trained
        losses, right, grads = [], [], []
        for h, t in zip(hidden.split(_chunk(hidden)), targets.split(_chunk(hidden)), strict=True):
            with torch.set_grad_enabled(on_the_way):
                h = h.detach().requires_grad_(on_the_way)
                logits, total, loss, good = _losses(head, h, t)
            if on_the_way:
                grads += torch.autograd.grad(logits, h, _slopes(logits, total, t).to(logits.dtype))
            losses.append(loss)
            right.append(good)
            del logits  # free them before the next chunk
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
        # Summing many chunks in bfloat16 would lose more precision than one product.
        parts, sums = [], {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained}
        for h, t, w in zip(*(x.split(_chunk(hidden)) for x in (hidden, targets, weights)), strict=True):
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                h = h.detach().requires_grad_()
                logits, total, *_ = _losses(ctx.head, h, t)
            slopes = _slopes(logits, total, t).mul_(w.unsqueeze(-1)).to(logits.dtype)
            grad, *rest = torch.autograd.grad(logits, [h, *others], slopes)
            del logits
            parts.append(grad)
            for p, one in zip(others, rest, strict=True):
                sums[p] += one
            if matrix is not None:
                _add_product(sums[matrix], slopes.t(), h.detach().to(slopes.dtype))
        # Popped, so that they become `.grad` without a copy.
        return torch.cat(parts), None, None, *(sums.pop(p).to(p.dtype) for p in trained)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary of the size of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    for block, rows in zip(total.split(_BLOCK), a.split(_BLOCK), strict=True):
        block += rows @ b


def _matrix(head: nn.Module) -> Tensor | None:
    """The trained W if the layer is exactly h W^T + b; else None."""
    hooked = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks
    plain = type(head) is nn.Linear and not hooked and head.weight.requires_grad
    return head.weight if plain else None  # type: ignore[return-value]
