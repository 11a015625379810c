"""Gradient rules of the operators. Each backward pass is an operator of its own and has no second derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmai_fast.ops.backend import call, is_plain
from cmai_fast.ops.schema import LIBRARY


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _cosine_heads_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.cmai_fast.cosine_heads_backward(grad, *ctx.saved_tensors)


def _save_info_nce(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, keys, labels, scale, _, groups = inputs
    _, row_lse, column_lse = output
    ctx.mark_non_differentiable(row_lse, column_lse)
    ctx.save_for_backward(query, keys, labels, scale, row_lse, column_lse, groups)


def _info_nce_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, Tensor, None, None]:
    grad_query, grad_keys, grad_scale = torch.ops.cmai_fast.info_nce_backward(grad, *ctx.saved_tensors)
    return grad_query, grad_keys, None, grad_scale, None, None


def _save_gated_activation(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    x, other, ctx.kind = inputs
    ctx.save_for_backward(x, other)


def _gated_activation_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, other = ctx.saved_tensors
    grad_x, grad_other = torch.ops.cmai_fast.gated_activation_backward(grad, x, other, ctx.kind)
    return grad_x, None if other is None else grad_other, None


_activate, _activate_backward = call("gated_activation"), call("gated_activation_backward")


class _GatedActivation(torch.autograd.Function):
    """The rule of `gated_activation`, around the kernels themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, kind: str) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x, other)
        return _activate(x, other, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():  # the operator refuses the second derivative
            return _gated_activation_backward(ctx, grad)
        x, other = ctx.saved_tensors
        grad_x, grad_other = _activate_backward(grad, x, other, ctx.kind)
        return grad_x, None if other is None else grad_other, None


def gated_activation(x: Tensor, other: Tensor | None, kind: str) -> Tensor:
    """The operator `gated_activation`. Bypasses PyTorch's dispatcher unless a mode or transform is active.

    Every MLP of a model makes a call. With the dispatcher its forward and backward pass over 4 x 8 elements would take
    91 microseconds instead of 52, in plain PyTorch 30 (gated SiLU, C++ kernel, one thread, AMD EPYC, best of 25).
    """
    if not is_plain(x) or not (other is None or type(other) is Tensor):
        return torch.ops.cmai_fast.gated_activation(x, other, kind)
    if torch.is_grad_enabled() and (x.requires_grad or (other is not None and other.requires_grad)):
        return _GatedActivation.apply(x, other, kind)
    return _activate(x, other, kind)


def _refuse_second_derivative(name: str) -> None:
    # Without a rule PyTorch would treat the gradients as constants, and second derivatives would be wrong.
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"cmai_fast::{name} has no second derivative; for one, write it with torch.nn.functional")

    torch.library.register_autograd(f"cmai_fast::{name}_backward", backward, lib=LIBRARY)


torch.library.register_autograd(
    "cmai_fast::cosine_heads", _cosine_heads_backward, setup_context=_save_inputs, lib=LIBRARY
)
torch.library.register_autograd("cmai_fast::info_nce", _info_nce_backward, setup_context=_save_info_nce, lib=LIBRARY)
torch.library.register_autograd(
    "cmai_fast::gated_activation", _gated_activation_backward, setup_context=_save_gated_activation, lib=LIBRARY
)
for _name in ("cosine_heads", "info_nce", "gated_activation"):
    _refuse_second_derivative(_name)
