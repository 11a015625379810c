"""One thing that is asked, as every part of the library passes it on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    id: str | int
    images: tuple[Any, ...]
    prompt: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: Sample | Mapping[str, Any], place: int = 0) -> Sample:
        """A record as easy-VQA's and users' own have it (`image`, `question`, `answer`, `choices`, `sample_id`).

        `place` names a record without an id.
        """
        if isinstance(record, Sample):
            return record
        answer = record.get("answer")
        return cls(
            id=record.get("sample_id", place),
            images=(record["image"],),
            prompt=record["question"],
            references=() if answer is None else (answer,),
            choices=tuple(record.get("choices", ())),
        )

    @property
    def answer(self) -> str:
        """The first reference.

        Raises:
            ValueError: there is none.
        """
        if not self.references:
            raise ValueError(f"sample {self.id!r} has no references; expected at least one right answer")
        return self.references[0]


def numeric_id(sample_id: str | int) -> int:
    """The id as operators take it (int64): itself where it is a whole number, else 63 bits of its hash."""
    if isinstance(sample_id, int) and not isinstance(sample_id, bool) and -(2**63) <= sample_id < 2**63:
        return sample_id
    return int.from_bytes(hashlib.blake2b(repr(sample_id).encode(), digest_size=8).digest(), "big") >> 1
