"""Lean activations: the same bits, less kept, and the model is given back."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from cmai_fast.attacks import Victim, exact_gradient
from cmai_fast.bridge import bridge_of, lean_activations
from cmai_fast.evaluation.overhead import SavedActivations
from cmai_fast.pixels import PixelSpace
from families import FAMILIES


def mlp(kind: type = LlamaMLP, act: str = "silu") -> nn.Module:
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "intermediate_size": 24, "mlp_bias": False, "hidden_act": act}
    return kind(SimpleNamespace(**settings, hidden_activation=act))


def kept(model: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Output and all gradients, and the bytes that were kept for them between forward and backward."""
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with SavedActivations(model) as held:
        out = model(x)
        bytes_kept = held.live
        grads = torch.autograd.grad(out.square().sum(), leaves)
    return [out, *grads], bytes_kept


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("kind", "act"), [(LlamaMLP, "silu"), (GemmaMLP, "gelu_pytorch_tanh"), (LlamaMLP, "relu2")])
def test_a_gated_mlp_keeps_a_third_less_and_has_the_same_bits(kind: type, act: str, trainable: bool) -> None:
    model = mlp(kind, act).requires_grad_(trainable)
    x = torch.randn(2, 5, 8, requires_grad=True)
    plain, before = kept(model, x)
    with lean_activations(model):
        lean, after = kept(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))
    assert before - after >= 2 * 5 * 24 * 4  # act(gate)
    if not trainable and act == "silu":
        assert after == 2 * 5 * (24 + 24) * 4  # gate and up


@pytest.mark.parametrize("act", ["quick_gelu", "gelu_new"])
def test_an_activation_of_several_operations_keeps_its_input_alone(act: str) -> None:
    model = nn.Sequential(nn.Linear(8, 24), ACT2FN[act], nn.Linear(24, 8)).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    plain, before = kept(model, x)
    with lean_activations(model):
        lean, after = kept(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))
    assert after == 5 * 24 * 4 < before


def test_a_backward_pass_outside_autocast_takes_the_activation_as_the_forward_pass_did() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turn", torch.randn(24, 24))

        def forward(self, x):
            return torch.tanh(x @ self.turn)  # of float32 and bfloat16, which autocast alone multiplies

    model = mlp()
    model.act_fn = Turned()
    x = torch.randn(5, 8, requires_grad=True)
    found = []
    for context in (contextlib.nullcontext(), lean_activations(model)):
        with context:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_factor_of_another_width_gets_a_gradient_of_its_own_shape() -> None:
    model = mlp()
    model.up_proj = nn.Linear(8, 1)
    x = torch.randn(5, 8, requires_grad=True)
    plain, _ = kept(model, x)
    with lean_activations(model):
        lean, _ = kept(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.kind != "dual"], ids=lambda f: f.name)
def test_an_attack_gradient_is_that_of_the_model_as_it_was(family) -> None:
    model = family.model()
    batch = family.batch(model, family.samples())
    objective = Victim(bridge_of(model), PixelSpace.from_processor(family.processor), batch)
    at = objective.space.to_model(objective.pixels())
    plain, _ = exact_gradient(objective, at)
    with lean_activations(model):
        lean, _ = exact_gradient(objective, at)
    assert torch.equal(plain, lean)


def test_other_mlps_stay_and_all_come_back_after_an_exception() -> None:
    class Own(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    hooked, learnt = mlp(), mlp()
    hooked.forward = hook = lambda x: x  # type: ignore[method-assign]  # somebody's
    learnt.act_fn = nn.PReLU()
    model = nn.ModuleList([mlp(), mlp(Own), learnt, hooked, ACT2FN["quick_gelu"]])
    context = lean_activations(model)
    context.__enter__()
    assert ["forward" in m.__dict__ for m in model] == [True, False, False, True, True]
    assert hooked.forward is hook
    with pytest.raises(RuntimeError, match="stop"):
        context.gen.throw(RuntimeError("stop"))
    assert ["forward" in m.__dict__ for m in model] == [False, False, False, True, False]
    assert hooked.forward is hook
