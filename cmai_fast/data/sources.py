"""Where samples come from, by the name that a user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cmai_fast.data.sample import Sample

NAMES = ("easyvqa",)


@dataclass(frozen=True)
class DataSource:
    """A data set by name.

    Args:
        name: a registered name.
        fields: other names of a record's fields.
        split_seed: divides one file into train, calibration and test.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=dict)
    split_seed: int | None = None

    def check(self) -> None:
        """Raises ValueError for what can be refused without loading anything."""
        if self.name not in NAMES:
            raise ValueError(f"unknown data {self.name!r}; known: {', '.join(NAMES)}")

    def load(self, split: str, limit: int | None = None, seed: int = 0) -> Sequence[Sample]:
        """The samples of a split, drawn with `seed` where there are more than `limit`."""
        from cmai_fast.data.easyvqa import EasyVQA

        self.check()
        return EasyVQA(split, limit, seed)  # type: ignore[return-value]

    def fingerprint(self) -> str:
        """What results say of the data, so that two runs can be compared."""
        from importlib.metadata import version

        return f"{self.name} {version('easy-vqa')}"
