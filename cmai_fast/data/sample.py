"""One thing that is asked, as every part of the library passes it on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """Images, a prompt about them, and what would be right.

    Attributes:
        id: names the sample in results; unique in its data set.
        images: none, one or several, each anything that `data.pictures` reads (path, PIL picture, array, bytes).
        prompt: the question or instruction; empty where a model takes none (dual encoders).
        references: right answers, at least one wherever a model is trained or measured; training uses the first.
        choices: the answers that were to choose from, right and wrong; empty where the answer is open.
        where: the file and line that the sample was read from, for errors; empty if it was made in memory.
    """

    id: str | int
    images: tuple[Any, ...]
    prompt: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    where: str = field(default="", compare=False, repr=False)

    @classmethod
    def of(cls, record: Sample | Mapping[str, Any], place: int = 0) -> Sample:
        """The sample of a record in any of the forms that docs/data.md lists; a `Sample` is returned as it is.

        Args:
            place: the record's number in its batch or data set: its id if it has none, and its name in errors.

        Raises:
            TypeError, ValueError: naming the sample, the key, what was found and what was expected.
        """
        from cmai_fast.data.records import sample_of

        return record if isinstance(record, Sample) else sample_of(record, f"record {place}", place)

    @property
    def name(self) -> str:
        """What errors call the sample: its id, and the file and line where it has one."""
        return f"sample {self.id!r}" + (f" ({self.where})" if self.where else "")

    @property
    def answer(self) -> str:
        """The first reference.

        Raises:
            ValueError: there is none.
        """
        if not self.references:
            raise ValueError(f"{self.name} has no answer; expected at least one right answer (key 'answer')")
        return self.references[0]


def numeric_id(sample_id: Hashable) -> int:
    """The id as operators take it (int64): itself where it is a whole number, else 63 bits of its hash."""
    if isinstance(sample_id, int) and not isinstance(sample_id, bool) and -(2**63) <= sample_id < 2**63:
        return sample_id
    return int.from_bytes(hashlib.blake2b(repr(sample_id).encode(), digest_size=8).digest(), "big") >> 1
