"""A folder with a file of records for each split (`train.jsonl`, `test.csv`, ...), or with an imagefolder for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cmai_fast.data.formats.format import FORMATS, data_format, digest_of, format_of_suffix
from cmai_fast.data.formats.imagefolder import metadata_of
from cmai_fast.data.sample import Sample

# Our split, and its names elsewhere.
ALIASES = {
    "train": ("train", "training"),
    "calibration": ("calibration", "validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}


def split_named(split: str, names: Sequence[str]) -> str | None:
    """The name of our split among `names`, or None. A year or 1 may follow its word: `val2014`, `test1`.

    Raises:
        ValueError: two such names, as `val2014` and `val2017`.
    """
    for ending in ("", r"(?:\d{4}|1)"):
        for word in ALIASES[split]:
            found = [name for name in names if re.fullmatch(word + ending, name)]
            if len(found) > 1:
                raise ValueError(f"{' and '.join(found)} may both be the split {split}; choose by --split NAME (split)")
            if found:
                return found[0]
    return None


def splits_of(folder: str) -> tuple[str, ...]:
    return tuple(_files(folder))


def fingerprint(folder: str) -> str:
    return " ".join(f"{split} {digest_of(file)}" for split, file in _files(folder).items())


@data_format("folder", takes="FOLDER", splits=splits_of, fingerprint=fingerprint)
def read_folder(folder: str, split: str, fields: Mapping[str, str]) -> Iterable[Sample]:
    file = _files(folder)[split]
    form = format_of_suffix(file)
    form.check(str(file))
    return form.read(str(file), "", fields)


def _files(folder: str) -> dict[str, Path]:
    """The file of records of each of our splits.

    Raises:
        ValueError: no file, or two for one split.
    """
    suffixes = {suffix for _, form in FORMATS.items() for suffix in form.suffixes}
    found: dict[str, Path] = {}
    for entry in sorted(Path(folder).iterdir()):
        split = next((own for own, names in ALIASES.items() if entry.stem.lower() in names), None)
        file = metadata_of(entry) if entry.is_dir() else entry if entry.suffix.lower() in suffixes else None
        if split is None or file is None:
            continue
        if split in found:
            raise ValueError(f"{found[split]} and {file} both belong to the split {split}; keep one")
        found[split] = file
    if not found:
        there = sorted(entry.name for entry in Path(folder).iterdir())
        shown = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        raise ValueError(
            f"{folder} holds {shown or 'nothing'}; expected files train, calibration and test that end in one of "
            f"{', '.join(sorted(suffixes))}, or pictures with metadata.jsonl or metadata.csv. For official files name "
            f"the data set, as in coco-captions:{folder} (docs/formats.md)"
        )
    return {split: found[split] for split in ALIASES if split in found}
