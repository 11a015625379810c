"""`Sample`, the unit of data in every part of the library."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from cmai_fast.metrics.exact_match import folded

ASK_CAPTION = "Provide a one-sentence caption for the provided image."  # the prompt of captioning
ASK_SHORT = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Sample:
    """Images, a prompt about them, and the right answers.

    Attributes:
        id: the sample's name in results; unique in its data set.
        images: none, one or several, each anything that `data.pictures` reads (path, PIL image, array, bytes).
        prompt: the question or instruction; empty for models that take none (dual encoders).
        references: right answers; training and evaluation need at least one, and training uses the first.
        choices: the answers to choose from, right and wrong; empty if the question is open.
        where: file and line of the record, for errors; empty if the sample was made in memory.
    """

    id: str | int
    images: tuple[Any, ...]
    prompt: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    where: str = field(default="", compare=False, repr=False)

    @classmethod
    def of(cls, record: Sample | Mapping[str, Any], place: int = 0) -> Sample:
        """The sample of a record in any of the forms in docs/data.md; a `Sample` is returned unchanged.

        Args:
            place: the record's number in its batch or data set: its name in errors, and its id if it has none.

        Raises:
            TypeError, ValueError: names the sample, the key, what was found and what was expected.
        """
        from cmai_fast.data.records import sample_of

        return record if isinstance(record, Sample) else sample_of(record, f"record {place}", place)

    @property
    def name(self) -> str:
        """The sample's name in errors: its id, and its file and line if known."""
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

    @property
    def wrong_choices(self) -> tuple[str, ...]:
        """The choices that no reference says, each once."""
        return differing(self.choices, self.references)


def differing(answers: Iterable[str], references: Iterable[str]) -> tuple[str, ...]:
    """The answers that say something else than the references, each once: `Yes.` and `yes` say the same."""
    right = {folded(r) for r in references}
    first: dict[str, str] = {}
    for answer in answers:
        first.setdefault(folded(answer), answer)
    return tuple(answer for key, answer in first.items() if key not in right)


def numeric_id(sample_id: Hashable) -> int:
    """The id as operators take it (int64): an integer unchanged, anything else as 63 bits of its hash."""
    if isinstance(sample_id, int) and not isinstance(sample_id, bool) and -(2**63) <= sample_id < 2**63:
        return sample_id
    return int.from_bytes(hashlib.blake2b(repr(sample_id).encode(), digest_size=8).digest(), "big") >> 1


class SampleList(Sequence[Sample]):
    """Samples that are made when they are asked for; a slice is a list of them."""

    @abstractmethod
    def at(self, place: int) -> Sample:
        """The sample at `place`, from 0 to `len(self)` - 1."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]
