"""NLVR2 in its official files: a statement about two photos, which is true or false.

Source: Suhr et al., 2019, "A Corpus for Reasoning about Natural Language Grounded in Photographs"; https://github.com/lil-lab/nlvr.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from cmai_fast.data.formats.format import data_format
from cmai_fast.data.formats.jsonl import lines_of
from cmai_fast.data.formats.official import TRUTH, digest_of_files, files_of, first_folder, no_fields, text_of, truth_of
from cmai_fast.data.sample import Sample

_IDENTIFIER = re.compile(r"((train|dev|test\d?)-\d+-\d+)-\d+")  # split, set, pair, sentence
_PICTURES = ("{}", "images/{}", "images")


def _files(folder: str) -> dict[str, Path]:
    return files_of(folder, r"(train|dev|test\d?)\.json", ("data",), "dev.json")


@data_format(
    "nlvr2",
    takes="FOLDER",
    splits=lambda folder: tuple(_files(folder)),
    fingerprint=lambda folder: digest_of_files(_files(folder)),
    lone=True,
)
def read_nlvr2(folder: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("nlvr2", fields)
    places: dict[str, str] = {}
    for where, record in lines_of(str(_files(folder)[split])):
        name = text_of(record, "identifier", where)
        match = _IDENTIFIER.fullmatch(name)
        if match is None:
            raise ValueError(f"{where}: identifier is {name!r:.60}; expected SPLIT-SET-PAIR-SENTENCE, as dev-850-0-0")
        pair, own = match[1], match[2]
        if own not in places:
            places[own] = str(first_folder(folder, [place.format(own) for place in _PICTURES]))
        # The photos of train lie in 100 folders, which the record names.
        photos = places[own] if record.get("directory") is None else f"{places[own]}/{record['directory']}"
        pictures = (f"{photos}/{pair}-img0.png", f"{photos}/{pair}-img1.png")
        sentence, answers = text_of(record, "sentence", where), truth_of(record, f"{where} (identifier {name!r})")
        yield Sample(name, pictures, sentence, answers, TRUTH, where)
