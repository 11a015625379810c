"""The activation of an MLP, forward and backward: the operator, plain PyTorch, and a copy of the same traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmai_fast import ops


def silu_times(x: Tensor, other: Tensor) -> Tensor:
    return F.silu(x) * other


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def on(device: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    name = f"{device}-{kind}-{str(dtype).removeprefix('torch.')}"
    return pytest.param(device, kind, shape, dtype, id=name, marks=[pytest.mark.gpu] if device == "cuda" else [])


# On a GPU the MLPs of CLIP ViT-L/14-336 with 8 images, and of a language model of 7B with 2048 tokens.
@pytest.mark.parametrize(
    ("device", "kind", "shape", "dtype"),
    [
        *(on("cpu", kind, (2048, 2048), t) for kind in ("silu", "quick_gelu") for t in (torch.float32, torch.bfloat16)),
        on("cuda", "silu", (2048, 11008), torch.bfloat16),
        on("cuda", "quick_gelu", (8 * 577, 4096), torch.bfloat16),
    ],
    indirect=["device"],
)
def test_gated_activation(
    side_by_side, device: torch.device, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    gated = kind == "silu"
    grad, *leaves = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2 + gated))
    for leaf in leaves:
        leaf.requires_grad_()

    def differentiate(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    # Forward: all leaves read, the result written. Backward: those and its gradient read, the leaves' written.
    size = grad.numel() * (3 * len(leaves) + 2)
    source, target = (torch.zeros(size // 2, dtype=dtype, device=device) for _ in range(2))
    targets = {"plain": ("at least", 2.0), "copy": ("at least", 0.8)}
    if device.type == "cpu":
        targets = {"plain": ("at least", 2.0 if dtype == torch.float32 else 0.9)}
    side_by_side(
        f"{kind}{', gated,' if gated else ''} forward + backward, {'x'.join(map(str, shape))}, {dtype}",
        {
            "operator": differentiate(lambda *args: ops.gated_activation(*args, kind=kind)),
            "plain": differentiate(silu_times if gated else quick_gelu),
            "copy": lambda: target.copy_(source),
        },
        device=device,
        limit="copy",
        targets=targets,
    )
