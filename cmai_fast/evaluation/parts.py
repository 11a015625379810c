"""Work on many samples in batches that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from cmai_fast.evaluation.processes import Processes
from cmai_fast.pipeline import out_of_memory

T = TypeVar("T")


class Parts:
    """Batches of at most `size` samples; the size is halved when memory runs out."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"batch_size is {size}; expected at least 1")
        self.size, self._warned = size, False

    def over(self, rows: Sequence[int], work: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
        """Yields batches of `rows`, each with the result of `work`.

        Raises:
            torch.OutOfMemoryError: a single sample does not fit; the message says what helps.
        """
        start = 0
        while start < len(rows):
            part = list(rows[start : start + self.size])
            try:
                result = work(part)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise torch.OutOfMemoryError(
                        f"one sample alone does not fit into memory ({str(error).splitlines()[0]}); use a smaller "
                        "dtype (bfloat16), a larger device, or smaller images"
                    ) from error
                self.size = max(1, len(part) // 2)
                self._warn()
            else:
                yield part, result
                start += len(part)
                continue
            if torch.cuda.is_available():  # outside the except block, which keeps the tensors of the batch alive
                torch.cuda.empty_cache()

    def together(
        self, rows: Sequence[int], work: Callable[[list[int]], T], processes: Processes
    ) -> Iterator[tuple[list[int], T]]:
        """`over`, of which each process works on its share of the rows; yields the batches of all, in order.

        A round is over when the caller in every process has seen its batches.
        """
        while rows:
            batch = rows[: min(processes.gathered(self.size)) * processes.count]
            for finished in processes.gathered(list(self.over(processes.part(batch), work))):
                yield from finished
            processes.gathered(None)
            rows = rows[len(batch) :]

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                f"a batch does not fit into memory; evaluation continues with {self.size} samples at a time, with the "
                "same results. Set a smaller batch_size to avoid the attempt",
                RuntimeWarning,
                stacklevel=4,
            )
        self._warned = True
