"""One step of PGD and of APGD: the operator, eager PyTorch, `torch.compile`, and a copy of the same traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cmai_fast import ops

EPS, STEP, MOMENTUM = 8 / 255, 2 / 255, 0.75


def on(device: str, shape: tuple[int, ...], grad: torch.dtype = torch.float32) -> Any:
    name = f"{device}-{'x'.join(map(str, shape))}-{str(grad).removeprefix('torch.')}"
    return pytest.param(device, shape, grad, id=name, marks=[pytest.mark.gpu] if device == "cuda" else [])


def state(shape: tuple[int, ...], device: torch.device, grad: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=generator).to(device)
    radius = torch.full((shape[0],), EPS, device=device)
    return {
        "adv": clean.clone(),
        "grad": torch.randn(shape, generator=generator).to(device, grad),
        "clean": clean,
        "eps": radius,
        "step": radius / 4,
    }


def traffic(images: float, like: Tensor) -> Callable[[], Any]:
    """A copy that reads and writes as much as `images` float32 images together."""
    source, target = (torch.rand(round(like.numel() * images / 2), device=like.device) for _ in range(2))
    return lambda: target.copy_(source)


def pgd_in_new_tensors(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    """The operations of torchattacks' PGD."""
    adv = adv + STEP * grad.sign()
    delta = torch.clamp(adv - clean, min=-EPS, max=EPS)
    return torch.clamp(clean + delta, min=0, max=1)


def pgd_in_place(adv: Tensor, grad: Tensor, low: Tensor, high: Tensor) -> None:
    """The fewest operations that eager PyTorch can do it with, the bounds made beforehand."""
    adv.add_(grad.sign(), alpha=STEP)
    torch.clamp(adv, low, high, out=adv)


@pytest.mark.parametrize(
    ("device", "shape", "grad"),
    [
        on("cpu", (32, 3, 64, 64)),
        on("cpu", (8, 3, 336, 336)),
        on("cuda", (32, 3, 336, 336)),
        on("cuda", (32, 3, 336, 336), torch.bfloat16),
    ],
    indirect=["device"],
)
def test_pgd_step(side_by_side, device: torch.device, shape: tuple[int, ...], grad: torch.dtype) -> None:
    case = state(shape, device, grad)
    adv, gradient, clean = case["adv"].clone(), case["grad"], case["clean"]
    low, high = (clean - EPS).clamp(0, 1), (clean + EPS).clamp(0, 1)
    compiled = torch.compile(pgd_in_new_tensors)
    targets = {"eager": ("at least", 4.0), "copy": ("at least", 0.9)}
    if device.type == "cpu":
        eager = 2.0 if clean.numel() > 10**6 else 1.0
        targets = {"eager": ("at least", eager), "torch.compile": ("at least", 1.0), "copy": ("at least", 0.8)}
    side_by_side(
        f"PGD step, L_inf, {'x'.join(map(str, shape))}, {grad} gradient",
        {
            "operator": lambda: ops.pgd_linf_step_(**case),
            "eager": lambda: pgd_in_new_tensors(adv, gradient, clean),
            "eager in place": lambda: pgd_in_place(adv, gradient, low, high),
            "torch.compile": lambda: compiled(adv, gradient, clean),
            # adv read and written, clean and grad read.
            "copy": traffic(3 + gradient.element_size() / 4, clean),
        },
        device=device,
        limit="copy",
        targets=targets,
    )


def apgd_in_new_tensors(
    adv: Tensor,
    previous: Tensor,
    grad: Tensor,
    best: Tensor,
    best_grad: Tensor,
    clean: Tensor,
    step: Tensor,
    improved: Tensor,
    restart: Tensor,
) -> tuple[Tensor, Tensor]:
    """The image-sized operations that AutoAttack's APGD makes of an iteration, its bookkeeping by row numbers."""
    rows = improved.nonzero().flatten()
    best[rows] = adv[rows].clone()
    best_grad[rows] = grad[rows].clone()
    rows = restart.nonzero().flatten()
    adv[rows], grad[rows] = best[rows].clone(), best_grad[rows].clone()
    change, before = adv - previous, adv.clone()
    stepped = adv + step.view(-1, 1, 1, 1) * torch.sign(grad)
    stepped = torch.clamp(torch.min(torch.max(stepped, clean - EPS), clean + EPS), 0.0, 1.0)
    mixed = adv + (stepped - adv) * MOMENTUM + change * (1 - MOMENTUM)
    return torch.clamp(torch.min(torch.max(mixed, clean - EPS), clean + EPS), 0.0, 1.0) + 0.0, before


@pytest.mark.parametrize(
    ("device", "shape", "grad"), [on("cpu", (8, 3, 336, 336)), on("cuda", (8, 3, 336, 336))], indirect=["device"]
)
def test_apgd_step(side_by_side, device: torch.device, shape: tuple[int, ...], grad: torch.dtype) -> None:
    case = state(shape, device, grad)
    n = shape[0]
    books = {"previous": case["adv"].clone(), "top_adv": case["adv"].clone(), "top_grad": case["grad"].clone()}
    # Every second row improved and one in eight restarts: about what a run of 100 steps has.
    flags = {"improved": torch.arange(n, device=device) % 2 == 0, "restart": torch.arange(n, device=device) % 8 == 3}
    plain = [t.clone() for t in (case["adv"], books["previous"], case["grad"], books["top_adv"], books["top_grad"])]
    side_by_side(
        f"APGD step, L_inf, {'x'.join(map(str, shape))}, {grad} gradient",
        {
            "operator": lambda: ops.apgd_linf_step_(**case, **books, **flags, momentum=MOMENTUM),
            "eager": lambda: apgd_in_new_tensors(*plain, case["clean"], case["step"], **flags),
            # adv, grad, clean and previous read, previous written; half of the rows write their books, an eighth goes
            # back: reads them and writes adv.
            "copy": traffic(5 + 2 / 2 + 2 / 8, case["clean"]),
        },
        device=device,
        limit="copy",
        targets={"eager": ("at least", 8.0)},
    )


@pytest.mark.parametrize(("device", "shape", "grad"), [on("cpu", (1, 3, 8, 8))], indirect=["device"])
def test_call_overhead(side_by_side, device: torch.device, shape: tuple[int, ...], grad: torch.dtype) -> None:
    case = state(shape, device, grad)
    image = case["adv"].clone()
    side_by_side(
        f"call overhead, {'x'.join(map(str, shape))}",
        {"operator": lambda: ops.pgd_linf_step_(**case), "one eager operation": lambda: image.add_(0.0)},
        device=device,
        ceilings={"operator": 8e-6},
    )
