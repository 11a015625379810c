"""Lean activations: the same results, less kept, and the model is given back."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN, QuickGELUActivation, SiLUActivation
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


def check_same(plain: list[torch.Tensor], lean: list[torch.Tensor], act: str) -> None:
    """The same bits, or of those activations that the operator rounds once, the same but for float32's rounding."""
    for one, other in zip(plain, lean, strict=True):
        if act in ("silu", "quick_gelu"):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(other, one)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("kind", "act"),
    [(LlamaMLP, "silu"), (LlamaMLP, "swish"), (LlamaMLP, "quick_gelu"), (GemmaMLP, "gelu_pytorch_tanh"),
     (LlamaMLP, "relu2")],
)  # fmt: skip
def test_a_gated_mlp_keeps_a_third_less_and_gives_the_same(kind: type, act: str, trainable: bool) -> None:
    model = mlp(kind, act).requires_grad_(trainable)
    x = torch.randn(2, 5, 8, requires_grad=True)
    plain, before = kept(model, x)
    with lean_activations(model):
        lean, after = kept(model, x)
    check_same(plain, lean, "silu" if act == "swish" else act)
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
    check_same(plain, lean, act)
    assert after == 5 * 24 * 4 < before


class Part(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.number]


@pytest.mark.parametrize("act", ["silu", "quick_gelu", "quick_gelu alone"])
def test_in_bfloat16_results_are_closer_to_the_exact_ones_than_the_modules(act: str) -> None:
    name, _, alone = act.partition(" ")
    model = ACT2FN[name] if alone else mlp(act=name)
    if not alone:  # the activation and the product of the branches, and nothing else
        model.gate_proj, model.up_proj, model.down_proj = Part(0), Part(1), nn.Identity()
    x = (2 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    errors = []
    exact, _ = kept(model, x.detach().double().requires_grad_())
    for context in (contextlib.nullcontext(), lean_activations(model)):
        with context:
            out = model(x)
            # Of the same gradient of the output: that of the output's square would differ by its rounding.
            (grad,) = torch.autograd.grad(out, x, (2 * exact[0]).to(out.dtype))
        errors.append([(a.double() - b).square().mean() for a, b in zip((out, grad), exact, strict=True)])
    for own, lean in zip(*errors, strict=True):
        assert lean < own


def test_without_gradients_it_gives_what_it_gives_with_them() -> None:
    model, x = mlp().bfloat16(), torch.randn(5, 8, dtype=torch.bfloat16)
    with lean_activations(model):
        with torch.no_grad():
            without = model(x)
        assert torch.equal(model(x), without)


def test_a_row_does_not_depend_on_its_batch() -> None:
    act, rows = copy.deepcopy(ACT2FN["quick_gelu"]), torch.randn(7, 37)
    with lean_activations(act):
        whole = act(rows)
        assert all(torch.equal(act(rows[i : i + 1].contiguous())[0], whole[i]) for i in range(7))


def test_hooks_of_an_activation_function_are_called() -> None:
    seen = []
    model, x = mlp(), torch.randn(5, 8, requires_grad=True)
    model.act_fn = nn.SiLU()
    model.act_fn.register_forward_hook(lambda module, args, out: seen.append(out))
    plain, _ = kept(model, x)
    with lean_activations(model):
        seen.clear()
        out = model(x)
    assert seen and torch.equal(out, plain[0])


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
    if any(type(module) in (nn.SiLU, SiLUActivation, QuickGELUActivation) for module in model.modules()):
        assert (lean - plain).abs().max() <= 1e-4 * plain.abs().max()
    else:
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
