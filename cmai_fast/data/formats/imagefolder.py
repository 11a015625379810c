"""A folder of pictures with `metadata.jsonl` or `metadata.csv`, in the imagefolder layout of `datasets`.

Each record names its picture by `file_name` (`file_names` for several), relative to the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cmai_fast.data.formats.csv import read_csv
from cmai_fast.data.formats.format import data_format, digest_of
from cmai_fast.data.formats.jsonl import read_jsonl
from cmai_fast.data.sample import Sample

METADATA = {"metadata.jsonl": read_jsonl, "metadata.csv": read_csv}


def metadata_of(folder: str | Path) -> Path | None:
    """The file of records of such a folder, or None."""
    return next((Path(folder, name) for name in METADATA if Path(folder, name).is_file()), None)


def _metadata(folder: str) -> Path:
    file = metadata_of(folder)
    if file is None:
        raise ValueError(f"{folder} has no {' or '.join(METADATA)}; expected records that name pictures by 'file_name'")
    return file


@data_format("imagefolder", takes="FOLDER", fingerprint=lambda folder: digest_of(_metadata(folder)))
def read_imagefolder(folder: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    file = _metadata(folder)
    return METADATA[file.name](str(file), split, fields)
