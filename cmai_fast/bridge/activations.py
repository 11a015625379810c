"""MLPs that store less for the backward pass.

A gated MLP computes act(gate) * up, and autograd stores gate, act(gate) and up: with frozen weights, half of what a
language model's layer stores. Computing act(gate) from gate takes one pass over memory, so it is recomputed. For CLIP's
x * sigmoid(1.702 x) only x is stored.

SiLU and QuickGELU are the operator `gated_activation`, which rounds once where the module rounds after every operation:
results differ from the module's own in their last bits, and in half precision are closer to the exact ones. Other
activation functions run as they are, and again in the backward pass: their results and gradients are bit-identical.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import NewGELUActivation, QuickGELUActivation, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from cmai_fast import ops
from cmai_fast.bridge.replaced import replaced

# Those of the operator, by its names. Not their subclasses, which may compute something else.
_KINDS = {nn.SiLU: "silu", SiLUActivation: "silu", QuickGELUActivation: "quick_gelu"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _code(forward: Callable[..., Any]) -> tuple[Any, ...]:
    code = forward.__code__
    return code.co_code, code.co_names, code.co_consts[1:]  # the first is the docstring


# down_proj(act_fn(gate_proj(x)) * up_proj(x)), which some 140 classes of transformers contain verbatim.
_GATED = {_code(cls.forward) for cls in (LlamaMLP, Qwen2_5_VLMLP)}


@contextmanager
def lean_activations(model: nn.Module) -> Iterator[None]:
    """Inside, MLPs of `model` store only gate and up, or the input of their activation function. They are restored
    afterwards, also after an exception. A pass without gradients gives what a pass with them gives.

    Other MLPs are not changed, nor are those whose `forward` was replaced in the instance.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        if type(module) is QuickGELUActivation:
            forwards[module] = functools.partial(ops.gated_activation, kind="quick_gelu")
        elif isinstance(module, (NewGELUActivation, QuickGELUActivation)):
            # Of several operations, each of which stores something. SiLU is one, which stores its input.
            forwards[module] = functools.partial(_activate, module.forward)
        elif _is_gated(module):
            forwards[module] = functools.partial(_gated, module, _kind(module.act_fn))
    with replaced(forwards):
        yield


def _is_gated(module: nn.Module) -> bool:
    act = getattr(module, "act_fn", None)
    if not isinstance(act, nn.Module) or getattr(act, "inplace", False) or any(True for _ in act.parameters()):
        return False  # weights of the activation function would get no gradient
    forward = type(module).forward
    return hasattr(forward, "__code__") and _code(forward) in _GATED


def _kind(act: Any) -> str | None:
    """The operator's name of an activation function that nothing else watches."""
    watched = "forward" in act.__dict__ or any(getattr(act, hooks) for hooks in _HOOKS)
    return None if watched else _KINDS.get(type(act))


def _gated(mlp: Any, kind: str | None, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if kind is not None and gate.shape == up.shape and gate.dtype == up.dtype:
        return mlp.down_proj(ops.gated_activation(gate, up, kind))
    if gate.shape == up.shape and torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return mlp.down_proj(_Activation.apply(mlp.act_fn, gate, up))
    return mlp.down_proj(mlp.act_fn(gate) * up)


def _activate(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _Activation.apply(act, x, None) if torch.is_grad_enabled() and x.requires_grad else act(x)


class _Activation(torch.autograd.Function):
    """act(x) * other, or act(x), by the function itself; stores x and other."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[Tensor], Tensor], x: Tensor, other: Tensor | None) -> Tensor:
        ctx.act, device = act, x.device.type
        # Autocast is active only in forward passes; CUDA's computes powers in float32, as the first pass did.
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.save_for_backward(x, other)
        return act(x) if other is None else act(x) * other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, other = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            leaf = x.detach().requires_grad_()
            value = ctx.act(leaf)
        value.backward(grad if other is None else grad * other)
        return None, leaf.grad, None if other is None else grad * value.detach()
