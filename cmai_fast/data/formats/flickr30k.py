"""Flickr30k in its official `.token` file, in `results.csv`, or in Karpathy's `dataset_flickr30k.json`.

Source: Young et al., 2014, "From image descriptions to visual denotations"; https://shannon.cs.illinois.edu/DenotationGraph/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format, digest_of, read_text
from cmai_fast.data.formats.karpathy import SPLITS, read_karpathy
from cmai_fast.data.formats.official import files_of, first_folder, no_fields, text_of
from cmai_fast.data.sample import Sample

_KARPATHY, _TOKEN, _TABLE = "dataset_flickr30k.json", "results_20130124.token", "results.csv"
_PICTURES = ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "images")
_LINES = {
    _TOKEN: (re.compile(r"([^#\t]+)#(\d+)\t(.*)"), "1000092795.jpg#0, a tab, and a caption"),
    # The copy of the table that is in use lacks the second bar in one line: "2199200615.jpg| 4   A dog runs ...".
    _TABLE: (re.compile(r"([^|]+)\|\s*(\d+)(?:\s*\||\s)(.*)"), "1000092795.jpg| 0| and a caption"),
}


def _file(folder: str) -> Path:
    """The file of captions: the one with splits first."""
    for name in (_KARPATHY, _TOKEN, _TABLE):
        found = files_of(folder, f"({re.escape(name)})", ("annotations", "flickr30k_images"))
        if found:
            return found[name]
    raise ValueError(
        f"{folder} has no {_KARPATHY}, {_TOKEN} or {_TABLE}; expected one of them, and the pictures in {_PICTURES[0]}/ "
        "(docs/formats.md)"
    )


def splits_of(folder: str) -> tuple[str, ...]:
    return SPLITS if _file(folder).name == _KARPATHY else ()


@data_format("flickr30k", takes="FOLDER", splits=splits_of, fingerprint=lambda folder: digest_of(_file(folder)))
def read_flickr30k(folder: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("flickr30k", fields)
    file = _file(folder)
    photos = str(first_folder(folder, _PICTURES))
    if file.name == _KARPATHY:
        return read_karpathy(file, split, partial(_place, photos))
    return _lines(file, photos)


def _place(photos: str, record: dict[str, Any], where: str) -> tuple[str, str]:
    name = text_of(record, "filename", where)
    return Path(name).stem, f"{photos}/{name}"


def _lines(file: Path, photos: str) -> Iterator[Sample]:
    """The images in the order of their first lines, each with its captions in the order of their numbers."""
    form, expected = _LINES[file.name]
    captions: dict[str, dict[int, str]] = {}
    first: dict[str, str] = {}
    for i, line in enumerate(read_text(str(file)).split("\n"), 1):
        if not line.strip() or (file.name == _TABLE and i == 1 and line.startswith("image_name")):
            continue
        where, match = f"{file} line {i}", form.fullmatch(line.rstrip("\r"))
        if match is None:
            raise ValueError(f"{where} is {line!r:.60}; expected {expected}")
        name, number = match[1].strip(), int(match[2])
        own = captions.setdefault(name, {})
        first.setdefault(name, where)
        if number in own:
            raise ValueError(f"{where}: {name} has a second caption {number}; keep one")
        own[number] = text_of({"caption": match[3].strip()}, "caption", where)
    for name, own in captions.items():
        texts = tuple(text for _, text in sorted(own.items()))
        yield Sample(Path(name).stem, (f"{photos}/{name}",), "", texts, where=first[name])
