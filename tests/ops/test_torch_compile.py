"""Functions that use the operators compile in one graph, without breaks, and give what they give without compiling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmai_fast import ops

N, PIXELS = 4, (4, 3, 8, 8)


def images(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(PIXELS, generator=generator) for name in names}


def attack(step: Callable[..., None], norm: str, clean: Tensor, grad: Tensor, velocity: Tensor) -> tuple[Tensor, ...]:
    eps, ids = torch.full((N,), 0.1), torch.arange(N)
    adv, model_input, bad = torch.empty_like(clean), torch.empty_like(clean), torch.zeros_like(ids)
    ops.random_start_(adv, clean, eps, ids, 3, norm)
    for size in (0.1, 0.05):
        step(
            adv, grad * adv, clean, eps, eps * size, ids != 2, model_input=model_input, velocity=velocity,
            nonfinite=bad, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.25),
        )  # fmt: skip
    return adv * 2, model_input[ids != 2], velocity, bad


# With ATEN_CPU_CAPABILITY=default, inductor of PyTorch 2.13 writes vector code without the headers that it needs.
inductor = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="inductor needs a CPU with vector instructions"
    ),
)


@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
@pytest.mark.parametrize(("step", "norm"), [(ops.pgd_linf_step_, "linf"), (ops.pgd_l2_step_, "l2")])
def test_steps(step: Callable[..., None], norm: str, compiler: str) -> None:
    compiled = torch.compile(attack, backend=compiler, fullgraph=True)
    results = [f(step, norm, **images("clean", "grad", "velocity")) for f in (attack, compiled)]
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [ops.apgd_linf_step_, ops.apgd_l2_step_])
def test_apgd_steps(step: Callable[..., None]) -> None:
    def iterate(**case: Tensor) -> dict[str, Tensor]:
        eps, rows = torch.full((N,), 0.1), torch.arange(N)
        step(**case, eps=eps, step=eps, improved=rows > 1, restart=rows == 1, momentum=0.75)
        return {name: image + 1 for name, image in case.items()}

    compiled = torch.compile(iterate, backend="aot_eager", fullgraph=True)
    results = [f(**images("adv", "previous", "grad", "top_adv", "top_grad", "clean")) for f in (iterate, compiled)]
    for name, plain in results[0].items():
        torch.testing.assert_close(results[1][name], plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_the_gated_activation_and_its_gradients(gated: bool) -> None:
    def mlp(x: Tensor, other: Tensor) -> Tensor:
        return ops.gated_activation(x * 2, other + 1 if gated else None, "quick_gelu").sum() + other.sum()

    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(3, 5, generator=generator, requires_grad=True) for _ in range(2)]
    results = []
    for f in (mlp, torch.compile(mlp, backend="aot_eager", fullgraph=True)):
        value = f(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_losses_and_their_gradients() -> None:
    def loss(query: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        own = torch.arange(len(query))
        contrast = ops.info_nce(query, keys, own, scale, symmetric=True, groups=torch.arange(len(keys)) // 2)
        return contrast + ops.cosine_heads(query[:, None], keys[: len(query), None]).sum()

    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((5, 4), (7, 4), ())]
    results = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value = f(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)
