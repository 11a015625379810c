"""Data sources: a named data set, a file, a folder or the hub, read one split at a time.

Nothing here imports PyTorch, so a command refuses bad data before it loads a model.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
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
        fields: our key to theirs, if the records have other names, such as {"question": "text"}.
        split_seed: divides one set of records into three splits that share no picture (`splits.divide`).
            Without it, one set of records serves as any split except `train`.
        split: one of the data set's own splits, by its own name (`val2017`), which is then the one set of records.
        missing: how many picture files may be missing. Samples that need them are left out; `load` warns and counts
            them.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=dict)
    split_seed: int | None = None
    split: str | None = None
    missing: int = 0

    def check(self, *splits: str, answers: bool = False, images: bool = False) -> None:
        """Checks the data without decoding pictures, importing PyTorch or using the network.

        Every record of a local file or folder is read. Errors are broken text, records without a question, empty
        answers, missing pictures and duplicate ids.

        Args:
            splits: the splits to check; by default all.
            answers, images: whether every sample needs an answer, and an image.

        Raises:
            ValueError: names file, line and sample.
        """
        check_fields(self.fields)
        for split in splits:
            _check_split(split)
        form, place = self._form()
        form.check(place)
        if form.takes not in ("FILE", "FOLDER", ""):
            return  # on a hub
        own = {self._own_split(form, place, split) for split in splits or self._all_splits(form, place)}
        for split, whole in sorted(own):
            samples = self._read(form, place, split, warn=False)
            if whole and self.split_seed is not None:
                self._divided(samples, self.split_seed)
            if answers and isinstance(samples, list):
                check_answers(samples)
            if images and isinstance(samples, list):
                check_images(samples)

    def load(self, split: str, limit: int | None = None, seed: int = 0) -> Sequence[Sample]:
        """The samples of a split; pictures are read on use.

        Args:
            split: train, calibration or test.
            limit: number of samples to draw; None takes all.
            seed: for drawing; the same seed and limit give the same samples.

        Raises:
            ValueError: as `check`, or the split does not exist.
        """
        _check_split(split)
        check_fields(self.fields)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1 sample, or None for all")
        form, place = self._form()
        own, whole = self._own_split(form, place, split)
        samples = self._read(form, place, own)
        rows: Sequence[int] = range(len(samples))
        if whole and self.split_seed is not None:
            rows = self._divided(samples, self.split_seed)[split]
        if limit is not None and limit < len(rows):
            import numpy as np

            drawn = np.sort(np.random.default_rng(seed).choice(len(rows), size=limit, replace=False))
            rows = [rows[i] for i in drawn.tolist()]
        if len(rows) == len(samples):
            return samples
        return [samples[i] for i in rows] if isinstance(samples, list) else Rows(samples, rows)

    def fingerprint(self) -> str:
        """A short text that changes when records, fields, split seed or split change.

        It covers the files of records, not the picture files.
        """
        form, place = self._form()
        own = form.fingerprint or digest_of
        made = f"{form.name} {own(place)} {sorted(self.fields.items())} {self.split_seed}"
        made += "" if self.split is None else f" {self.split}"
        return hashlib.blake2b(made.encode(), digest_size=16).hexdigest()

    def _form(self) -> tuple[Format, str]:
        """The format and the place of `name`.

        Raises:
            ValueError: an unknown name.
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

    def _read(self, form: Format, place: str, split: str, warn: bool = True) -> Sequence[Sample]:
        """The samples of a place whose pictures exist, after checking that ids are unique."""
        samples = form.read(place, split, self.fields)
        if isinstance(samples, Sequence) and not isinstance(samples, (list, tuple)):
            return samples
        rows = check_unique(samples)
        if not rows:
            raise ValueError(f"{place} holds no records; expected at least one")
        return with_pictures(rows, self.missing, warn)

    def _divided(self, samples: Sequence[Sample], seed: int) -> dict[str, list[int]]:
        try:
            return divide(samples, seed)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _all_splits(self, form: Format, place: str) -> list[str]:
        theirs = form.splits(place)
        if self._whole(form, theirs) is None:
            return [split for split in SPLITS if split_named(split, theirs)]
        return ["test"] if self.split_seed is None else list(SPLITS)

    def _own_split(self, form: Format, place: str, split: str) -> tuple[str, bool]:
        """The format's own name of the split, and whether it is the one set of records, of which `split_seed` makes
        three."""
        theirs = form.splits(place)
        whole = self._whole(form, theirs)
        if whole is not None:
            if self.split_seed is None and split == "train":
                raise ValueError(
                    f"{self.name}{f' {whole}' * bool(whole)} is one set of records: training and testing on the same "
                    "ones would measure nothing. Give --split-seed N (split_seed) to divide it, or a folder with files "
                    "train, calibration and test"
                )
            return whole, True
        if self.split_seed is not None:
            raise ValueError(
                f"{self.name} has the splits {', '.join(theirs)}; leave out --split-seed (split_seed), or name the one "
                "to divide: --split NAME (split)"
            )
        own = split_named(split, theirs)
        if own is None:
            raise ValueError(
                f"{self.name} has {', '.join(theirs)}, and no split {split!r}. Add {' or '.join(ALIASES[split][:2])}, "
                "name one of these by --split NAME (split), or give one set of records with --split-seed N (split_seed)"
            )
        return own, False

    def _whole(self, form: Format, theirs: Sequence[str]) -> str | None:
        """The format's own name of the one set of records, which may be empty; None if there are several splits."""
        if self.split is None:
            return "" if not theirs else theirs[0] if form.lone and len(theirs) == 1 else None
        if not theirs:
            raise ValueError(f"{self.name} is one set of records without a split {self.split!r}; leave out --split")
        if self.split not in theirs:
            raise ValueError(f"{self.name} has no split {self.split!r}; expected one of {', '.join(theirs)}")
        return self.split


class Rows(Sequence[Sample]):
    """A selection of a sequence that makes its samples on access."""

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
    """Raises ValueError if samples have no answer, with their number and the first few."""
    without = [sample for sample in samples if not sample.references]
    if without:
        raise ValueError(
            f"{len(without)} of {len(samples)} samples have no answer: {_first(s.name for s in without)}; expected a "
            "key answer (or answers), or --map answer=KEY, or a split that has answers (--split NAME)"
        )


def check_images(samples: Sequence[Sample]) -> None:
    """Raises ValueError if samples have no image, with their number and the first few."""
    without = [sample for sample in samples if not sample.images]
    if without:
        raise ValueError(
            f"{len(without)} of {len(samples)} samples have no image: {_first(s.name for s in without)}; expected a "
            "key image (or images), or --map image=KEY"
        )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")


def _place(form: Format, place: str) -> str:
    """Checks a place given as FORMAT:PLACE."""
    if form.takes not in ("FILE", "FOLDER"):
        if place and not form.takes:
            raise ValueError(f"{form.name}:{place}: {form.name} is a data set by itself; expected {form.name}")
        return place
    path = Path(place).expanduser()
    if not place or not (path.is_file() if form.takes == "FILE" else path.is_dir()):
        raise ValueError(f"{form.name}:{place}: there is no such {form.takes.lower()}")
    return str(path)


def _unknown(name: str) -> str:
    known = {named: f"{named}:{form.takes}" if form.takes else named for named, form in FORMATS.items()}
    parent = Path(name).expanduser().parent
    beside = {str(parent / file.name): str(parent / file.name) for file in parent.iterdir()} if parent.is_dir() else {}
    near = difflib.get_close_matches(name.partition(":")[0], known, n=1) or difflib.get_close_matches(name, beside, n=1)
    hint = f"did you mean {(known | beside)[near[0]]}? Expected" if near else "expected"
    named = ", ".join(text for text in known.values() if ":" not in text)
    placed = ", ".join(text for text in known.values() if ":" in text)
    return f"unknown data {name!r}; {hint} a file, a folder, {named}, or one of {placed}"


def with_pictures(samples: list[Sample], allowed: int = 0, warn: bool = True) -> list[Sample]:
    """The samples whose picture files all exist.

    Args:
        allowed: how many files may be missing.
        warn: whether a warning says how many files are missing, and how many samples are left out.

    Raises:
        ValueError: more are missing, or no sample is left; gives the numbers and the first few.
    """
    users: dict[Any, Sample] = {}  # of each picture file, the first sample
    for sample in samples:
        for image in sample.images:
            if isinstance(image, (str, os.PathLike)):
                users.setdefault(image, sample)
    gone = {path: sample for path, sample in users.items() if not os.path.isfile(path)}
    if not gone:
        return samples
    kept = [s for s in samples if not any(isinstance(i, (str, os.PathLike)) and i in gone for i in s.images)]
    counts = (
        f"{len(gone)} of {len(users)} pictures are missing, and {len(samples) - len(kept)} of {len(samples)} samples"
    )
    shown = _first(f"{path} ({sample.where or sample.name})" for path, sample in gone.items())
    if len(gone) > allowed:
        raise ValueError(
            f"{counts} need them: {shown}; relative paths start at the file of records. --missing N (missing) leaves "
            "such samples out, for up to N missing pictures"
        )
    if not kept:
        raise ValueError(f"{counts} need them, so no sample is left: {shown}")
    if warn:
        warnings.warn(f"{counts} are left out: {shown}", stacklevel=2)
    return kept


def _first(names: Iterable[str], few: int = 3) -> str:
    listed = list(islice(names, few + 1))
    return ", ".join(listed[:few]) + (", ..." if len(listed) > few else "")
