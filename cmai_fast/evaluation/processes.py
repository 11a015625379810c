"""Several processes that share the samples of a run, as `accelerate launch` and `torchrun` start them.

Each loads the whole model and attacks its part of every round of batches; the first one writes what all have found. The
result for a sample depends on seed and sample id alone, so a run gives the same numbers with any number of processes.
They must see the same disk: all read the state that the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """This process among those that share a run: number `rank` of `count`.

    All of them call the same methods in the same order. What they exchange is on the CPU, so they may share a GPU.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def device(self, device: str | None) -> str | None:
        """A GPU of its own for each process, unless one is named by its number (`cuda:0`) or there is none."""
        if self.count == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
            return device
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def gathered(self, mine: T) -> list[T]:
        """What each process gives, by rank."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, or its exception, in all of them; it runs in no other."""
        if self.count == 1:
            return work()
        found: T | Exception | None = None
        if self.first:
            try:
                found = work()
            except Exception as error:
                found = error
        found = self.gathered(found)[0]
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]

    def part(self, rows: Sequence[int]) -> list[int]:
        """This process's share of rows, as even as can be; those of all, by rank, are the rows in order."""
        start, end = (len(rows) * rank // self.count for rank in (self.rank, self.rank + 1))
        return list(rows[start:end])


@contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that the environment variables of `torchrun` tell of; without them, it alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    patience = timedelta(days=1)  # a batch of one process may take long after those of the others
    if dist.is_initialized():
        yield Processes(dist.get_rank(), count, dist.new_group(backend="gloo", timeout=patience))
        return
    dist.init_process_group("gloo", timeout=patience)
    try:
        yield Processes(dist.get_rank(), count, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
