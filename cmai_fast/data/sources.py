"""Where samples come from: a name, a file, a folder or a hub, one split of it at a time.

Nothing here imports PyTorch, so a command refuses bad data before it loads a model.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmai_fast.data.formats import FORMATS, Format, digest_of, format_of_suffix
from cmai_fast.data.formats.folder import ALIASES, split_named
from cmai_fast.data.formats.imagefolder import metadata_of
from cmai_fast.data.records import check_fields, check_unique
from cmai_fast.data.sample import Sample
from cmai_fast.data.splits import SPLITS, divide


@dataclass(frozen=True)
class DataSource:
    """A set of samples with up to three splits: train, calibration, test.

    Args:
        name: a registered name (`easyvqa`), `FORMAT:PLACE` (`jsonl:questions.txt`, `hf:REPO[:CONFIG]`), a file, or a
            folder: of files `train.jsonl`, `calibration.jsonl` (or `validation`), `test.jsonl`; of such folders; or of
            pictures with `metadata.jsonl` or `.csv`.
        fields: our key to theirs where the records have other names, as {"question": "text"}.
        split_seed: divides one set of records into the three splits, which share no picture (`splits.divide`).
            Without it one set of records is whatever split is asked for, but for `train`.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=dict)
    split_seed: int | None = None

    def check(self, *splits: str, answers: bool = False) -> None:
        """Refuses what can be refused without decoding a picture, importing PyTorch or using the network.

        Every record of a local file or folder is read: broken text, records without a question, answers that are none,
        missing pictures, ids that occur twice.

        Args:
            splits: those that will be asked for; without them, all that are there.
            answers: whether every sample needs an answer.

        Raises:
            ValueError: naming file, line and sample.
        """
        check_fields(self.fields)
        for split in splits:
            _check_split(split)
        form, place = self._form()
        form.check(place)
        if form.takes not in ("FILE", "FOLDER", ""):
            return  # on a hub
        for split in splits or self._all_splits(form, place):
            samples = self.load(split)
            if answers and isinstance(samples, list):
                check_answers(samples)

    def load(self, split: str, limit: int | None = None, seed: int = 0) -> Sequence[Sample]:
        """The samples of a split; pictures are read when they are used.

        Args:
            split: train, calibration or test.
            limit: how many samples to draw; None takes all.
            seed: of the draw; the same seed and limit give the same samples.

        Raises:
            ValueError: as `check`, or a split that is not there.
        """
        _check_split(split)
        check_fields(self.fields)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1 sample, or None for all")
        form, place = self._form()
        own = self._own_split(form, place, split)
        samples = _checked(place, form.read(place, own, self.fields))
        rows: Sequence[int] = range(len(samples))
        if not own and self.split_seed is not None:
            try:
                rows = divide(samples, self.split_seed)[split]
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        if limit is not None and limit < len(rows):
            import numpy as np

            drawn = np.sort(np.random.default_rng(seed).choice(len(rows), size=limit, replace=False))
            rows = [rows[i] for i in drawn.tolist()]
        if len(rows) == len(samples):
            return samples
        return [samples[i] for i in rows] if isinstance(samples, list) else Rows(samples, rows)

    def fingerprint(self) -> str:
        """A short text that changes when records, fields or division change.

        It covers the files of records and not the pictures beside them.
        """
        form, place = self._form()
        own = form.fingerprint or digest_of
        made = f"{form.name} {own(place)} {sorted(self.fields.items())} {self.split_seed}"
        return hashlib.blake2b(made.encode(), digest_size=16).hexdigest()

    def _form(self) -> tuple[Format, str]:
        """The format and the place behind the name.

        Raises:
            ValueError: nothing has that name.
        """
        head, colon, rest = self.name.partition(":")
        path = Path(self.name).expanduser()
        if colon and not path.exists() and head in FORMATS:
            return FORMATS[head], _place(FORMATS[head], rest)
        if self.name in FORMATS and not FORMATS[self.name].takes:
            return FORMATS[self.name], ""
        if path.is_dir():
            return FORMATS["folder" if metadata_of(path) is None else "imagefolder"], str(path)
        if not path.is_file():
            raise ValueError(_unknown(self.name))
        return format_of_suffix(path), str(path)

    def _all_splits(self, form: Format, place: str) -> list[str]:
        theirs = form.splits(place)
        if theirs:
            return [split for split in SPLITS if split_named(split, theirs)]
        return ["test"] if self.split_seed is None else list(SPLITS)

    def _own_split(self, form: Format, place: str, split: str) -> str:
        """The split in the format's own words; empty for one set of records."""
        theirs = form.splits(place)
        if theirs:
            if self.split_seed is not None:
                raise ValueError(f"{self.name} has the splits {', '.join(theirs)}; leave out --split-seed (split_seed)")
            own = split_named(split, theirs)
            if own is None:
                raise ValueError(
                    f"split is {split!r}; {self.name} has {', '.join(theirs)}. Add {' or '.join(ALIASES[split][:2])}, "
                    "or give one set of records with --split-seed N (split_seed)"
                )
            return own
        if self.split_seed is None and split == "train":
            raise ValueError(
                f"{self.name} is one set of records: training and testing on the same ones would measure nothing. Give "
                "--split-seed N (split_seed) to divide it, or a folder with files train, calibration and test"
            )
        return ""


class Rows(Sequence[Sample]):
    """Some samples of a sequence that makes them when they are asked for."""

    def __init__(self, samples: Sequence[Sample], rows: Sequence[int]) -> None:
        self._samples, self._rows = samples, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self._samples, self._rows[index])
        return self._samples[self._rows[index]]


def load_dataset(name: str, split: str, limit: int | None = None, seed: int = 0) -> Sequence[Sample]:
    """The samples of a split; the short form of `DataSource(name).load(split, limit, seed)`."""
    return DataSource(name).load(split, limit, seed)


def check_answers(samples: Sequence[Sample]) -> None:
    """Raises ValueError with the samples that have no answer: how many, and the first few."""
    without = [sample for sample in samples if not sample.references]
    if without:
        raise ValueError(
            f"{len(without)} of {len(samples)} samples have no answer: {_first(s.name for s in without)}; expected a "
            "key answer (or answers), or --map answer=KEY"
        )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")


def _place(form: Format, place: str) -> str:
    """A place that was named with its format."""
    if form.takes not in ("FILE", "FOLDER"):
        if place and not form.takes:
            raise ValueError(f"{form.name}:{place}: {form.name} is a data set by itself; expected {form.name}")
        return place
    path = Path(place).expanduser()
    if not place or not (path.is_file() if form.takes == "FILE" else path.is_dir()):
        raise ValueError(f"{form.name}:{place}: there is no such {form.takes.lower()}")
    return str(path)


def _unknown(name: str) -> str:
    named = [known for known, form in FORMATS.items() if not form.takes]
    placed = [f"{known}:{form.takes}" for known, form in FORMATS.items() if form.takes]
    parent = Path(name).expanduser().parent
    beside = [str(parent / file.name) for file in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(name, [*named, *beside], n=1)
    hint = f"did you mean {near[0]}? Expected" if near else "expected"
    return f"unknown data {name!r}; {hint} a file, a folder, {', '.join(named)}, or one of {', '.join(placed)}"


def _checked(place: str, samples: Iterable[Sample]) -> Sequence[Sample]:
    """What a format gave, as a sequence whose ids are unique and whose pictures exist."""
    if isinstance(samples, Sequence) and not isinstance(samples, (list, tuple)):
        return samples
    rows = check_unique(samples)
    if not rows:
        raise ValueError(f"{place} holds no records; expected at least one")
    paths = [(sample, path) for sample in rows for path in map(_path, sample.images) if path is not None]
    missing = [(sample, path) for sample, path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} pictures are missing: "
            f"{_first(f'{path} ({sample.where or sample.name})' for sample, path in missing)}; paths are relative to "
            "the file of records"
        )
    return rows


def _path(image: Any) -> str | None:
    return image if isinstance(image, str) else None


def _first(names: Iterable[str], few: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:few]) + (", ..." if len(listed) > few else "")
