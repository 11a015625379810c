"""Communication between the processes of distributed training, each with a copy of the model and a part of the batch.

A training step runs the parts of the model one by one, so `DistributedDataParallel`, which averages gradients after one
`forward`, does not see it: gradients are averaged here, once, at the end of the step. Attacks therefore cause no
traffic. In a single process, all functions here return their input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 1 << 23  # elements sent together: 32 MB of float32


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_equal(rows: int, what: str = "samples") -> None:
    """Raises ValueError, in every process, if their numbers of rows (or of `what`) differ."""
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
    """Whether `mine` is true in any process."""
    if count() == 1:
        return mine
    flag = torch.tensor(int(mine), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def row_numbers(rows: int) -> Tensor:
    """(rows,) int64: the indices of this process's rows in the whole batch."""
    first = dist.get_rank() * rows if count() > 1 else 0
    return torch.arange(first, first + rows)


def gather(rows: Tensor) -> Tensor:
    """(n, ...) of each process to (count * n, ...) of all, by rank; every process must have n rows.

    The gradient reaches this process's own rows, multiplied by `count`: a loss of all rows is the same in every
    process, and the gradients of its rows, one part per process, are averaged although they should be added.
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
    """`gather` of (n, L) whose L differs between processes: padded on the right to the longest."""
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
    """The mean of each `.grad` over all processes; a missing gradient counts as zero."""
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
