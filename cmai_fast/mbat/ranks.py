"""Several processes, each with a copy of the model and a part of the batch: what they tell each other.

A training step runs the parts of the model one by one, so the wrapper that averages gradients behind one `forward`
(`DistributedDataParallel`) sees none of it: gradients are averaged here, once, when the step is done. Attacks so cause
no traffic at all. In one process everything here gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 1 << 23  # elements sent together: 32 MB of float32


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_equal(rows: int, what: str = "samples") -> None:
    """Raises ValueError, in every process, where they do not have equally many rows (or what else is counted)."""
    if count() == 1:
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    extremes = torch.tensor([rows, -rows], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    most, fewest = int(extremes[0]), -int(extremes[1])
    if most != fewest:
        raise ValueError(
            f"a step has {fewest} {what} in one process and {most} in another, {rows} in this one; expected the same "
            'number. Leave accelerator_config={"even_batches": True}, or set dataloader_drop_last'
        )


def any_of(mine: bool) -> bool:
    """Whether it is so in any process."""
    if count() == 1:
        return mine
    flag = torch.tensor(int(mine), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def row_numbers(rows: int) -> Tensor:
    """(rows,) int64: the places of this process's rows in the whole batch."""
    first = dist.get_rank() * rows if count() > 1 else 0
    return torch.arange(first, first + rows)


def gather(rows: Tensor) -> Tensor:
    """(n, ...) of each process to (count * n, ...) of all, by rank; every process must have n rows.

    The gradient reaches this process's own rows, and there counts `count` times: a loss of all rows is the same in
    every process, and its gradients, of which each has the part of its rows, are averaged where they should be added.
    """
    world = count()
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.detach().contiguous())
    if rows.requires_grad:
        parts[dist.get_rank()] = rows + (world - 1) * (rows - rows.detach())
    return torch.cat(parts)


def gather_ragged(rows: Tensor, fill: int) -> Tensor:
    """`gather` of (n, L) whose L differs between processes: filled up on the right to the longest."""
    if count() == 1:
        return rows
    longest = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return gather(torch.nn.functional.pad(rows, (0, int(longest) - rows.shape[1]), value=fill))


def copy_from_first(parameters: Iterable[Tensor]) -> None:
    """Gives every process the values of the first."""
    if count() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


def average_gradients(parameters: list[Tensor]) -> None:
    """The mean of each `.grad` over all processes; a gradient that one of them lacks counts as zero."""
    if count() == 1 or not parameters:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    for p in (p for p, some in zip(parameters, there.tolist(), strict=True) if some and p.grad is None):
        p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        for grad, mean in zip(bucket, (flat / count()).split([g.numel() for g in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and (bucket[0].dtype != grad.dtype or sum(g.numel() for g in bucket) + grad.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
