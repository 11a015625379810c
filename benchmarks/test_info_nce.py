"""InfoNCE, forward and backward: the operator, the full matrix, and a loop over chunks that keeps gradients only; in
one direction, and as the trainer runs it: in both, and equal texts are no negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmai_fast import ops
from cmai_fast.evaluation.overhead import peak_bytes

DIM = 512


def extra_bytes(contender: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a call holds over what was held before it."""
    before, peak = peak_bytes(contender, device)
    return peak - before


def full_matrix(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * (query @ keys.T), labels)


def in_chunks(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> None:
    """As Liger-Kernel's fused losses: each chunk of rows is differentiated at once, so no logits outlive it."""
    leaves = (query, keys, scale)
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    for rows in torch.arange(len(query), device=query.device).split(512):
        loss = F.cross_entropy(scale * (query[rows] @ keys.T), labels[rows], reduction="sum") / len(query)
        for total, grad in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
            total += grad


@pytest.mark.parametrize(
    ("device", "count", "dtype"),
    [
        pytest.param("cpu", 4096, torch.float32, id="cpu-4096"),
        pytest.param("cuda", 16384, torch.bfloat16, id="cuda-16384", marks=pytest.mark.gpu),
        pytest.param("cuda", 65536, torch.bfloat16, id="cuda-65536", marks=pytest.mark.gpu),
    ],
    indirect=["device"],
)
def test_info_nce(side_by_side, device: torch.device, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = (
        F.normalize(torch.randn(count, DIM, generator=generator), dim=1).to(device, dtype).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    labels = torch.arange(count, device=device)

    def differentiate(loss: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(query, keys, labels, scale), (query, keys, scale))

    contenders = {
        "operator": differentiate(ops.info_nce),
        "full matrix": differentiate(full_matrix),
        "chunks": lambda: in_chunks(query, keys, labels, scale),
    }
    memory = {name: extra_bytes(run, device) for name, run in contenders.items() for _ in range(2)}  # warm
    on_cpu = device.type == "cpu"
    share = memory["operator"] / memory["full matrix"]
    side_by_side(
        f"InfoNCE forward + backward, N = M = {count}, d = {DIM}, {dtype}",
        contenders,
        device=device,
        targets={"full matrix": ("at most", 1.3) if on_cpu else ("at least", 1.3)},
        figures={"extra memory over the full matrix's": (share, "at most", 1 / 8)},
        rounds=7,
    )


def masked(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
    """(n, M) logits of n rows; -1e9 for the other keys of the group of a row's own key."""
    others = labels[:, None] != torch.arange(len(keys), device=keys.device)
    return (scale * (query @ keys.T)).masked_fill((groups[labels][:, None] == groups) & others, -1e9)


def masked_matrix(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
    logits = masked(query, keys, labels, scale, groups)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def masked_in_chunks(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, groups: Tensor) -> None:
    """Row i belongs to key i. The log-sum-exps of columns need a pass of their own before the first gradient."""
    leaves = (query, keys, scale)
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    chunks = torch.arange(len(query), device=query.device).split(512)
    column_lse = query.new_full((len(keys),), -torch.inf)
    with torch.no_grad():
        for rows in chunks:
            logits = masked(query[rows], keys, labels[rows], scale, groups)
            column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
    for rows in chunks:
        logits = masked(query[rows], keys, labels[rows], scale, groups)
        own = logits.gather(1, labels[rows, None]).sum()
        by_column = (logits.detach() - column_lse).exp_()  # the derivative of their sum
        loss = F.cross_entropy(logits, labels[rows], reduction="sum") + (by_column * logits).sum() - own
        for total, grad in zip(grads, torch.autograd.grad(loss / (2 * len(query)), leaves), strict=True):
            total += grad


@pytest.mark.parametrize(
    ("device", "count", "dim", "dtype"),
    [
        pytest.param("cpu", 64, 128, torch.float32, id="cpu-64"),
        pytest.param("cpu", 4096, DIM, torch.float32, id="cpu-4096"),
        pytest.param("cuda", 16384, DIM, torch.bfloat16, id="cuda-16384", marks=pytest.mark.gpu),
    ],
    indirect=["device"],
)
def test_grouped_info_nce(side_by_side, device: torch.device, count: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = (
        F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(device, dtype).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    labels = torch.arange(count, device=device)
    groups = torch.randint(count // 2, (count,), generator=generator).to(device)
    inputs = (query, keys, labels, scale)
    leaves = (query, keys, scale)
    contenders = {
        "operator": lambda: torch.autograd.grad(ops.info_nce(*inputs, symmetric=True, groups=groups), leaves),
        "masked matrix": lambda: torch.autograd.grad(masked_matrix(*inputs, groups), leaves),
        "chunks": lambda: masked_in_chunks(*inputs, groups),
    }
    many = count > 64
    memory = {name: extra_bytes(run, device) for name, run in contenders.items() for _ in range(2 * many)}  # warm
    side_by_side(
        f"InfoNCE with groups, both directions, forward + backward, N = M = {count}, d = {dim}, {dtype}",
        contenders,
        device=device,
        targets={"masked matrix": ("at most", 1.0 if many else 1.5), "chunks": ("at most", 1.1 if many else 1.0)},
        figures={
            "extra memory over the masked matrix's": (memory["operator"] / memory["masked matrix"], "at most", 1 / 8)
        }
        if many
        else None,
        rounds=7,
    )
