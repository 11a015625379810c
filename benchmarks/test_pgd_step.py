"""One PGD step on the CPU: our operator, the same arithmetic in eager PyTorch, and a copy of the same traffic."""

from __future__ import annotations

import pytest
import torch

from cmai_fast import ops

SHAPES = {"32x3x64x64": (32, 3, 64, 64), "8x3x336x336": (8, 3, 336, 336)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def state(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(request.param, generator=generator)
    n = len(clean)
    return {
        "adv": clean.clone(),
        "grad": torch.randn(request.param, generator=generator),
        "clean": clean,
        "eps": torch.full((n,), 8 / 255),
        "step": torch.full((n,), 2 / 255),
    }


def _eager(adv: torch.Tensor, grad: torch.Tensor, clean: torch.Tensor, eps: torch.Tensor, step: torch.Tensor) -> None:
    adv = adv + float(step[0]) * grad.sign()
    delta = torch.clamp(adv - clean, min=-float(eps[0]), max=float(eps[0]))
    torch.clamp(clean + delta, min=0, max=1)


@pytest.mark.parametrize("how", ["operator", "eager", "copy"])
def test_pgd_linf_step(benchmark, state: dict[str, torch.Tensor], how: str) -> None:
    benchmark.group = f"pgd_linf_step_ {'x'.join(map(str, state['adv'].shape))}"
    # adv, grad and clean are read and adv is written: four images of traffic, as two copies move.
    target = [torch.empty_like(state["adv"]) for _ in range(2)]
    run = {
        "operator": lambda: ops.pgd_linf_step_(**state),
        "eager": lambda: _eager(**state),
        "copy": lambda: (target[0].copy_(state["adv"]), target[1].copy_(state["grad"])),
    }[how]
    benchmark.extra_info["bytes"] = 4 * state["adv"].nbytes
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark(run)
