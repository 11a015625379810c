"""POPE in its official files: whether an object is in an image, yes or no.

Source: Li et al., 2023, "Evaluating Object Hallucination in Large Vision-Language Models";
https://github.com/AoiDragon/POPE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format, read_text
from cmai_fast.data.formats.jsonl import lines_of
from cmai_fast.data.formats.official import (
    digest_of_files,
    files_of,
    first_folder,
    no_fields,
    number_of,
    read_json,
    text_of,
)
from cmai_fast.data.sample import Sample

YES_NO = ("yes", "no")
_PICTURES = ("val2014", "images/val2014", "coco/val2014", "images")


def _files(folder: str) -> dict[str, Path]:
    names = r"\w+_pope_(?:seem_)?(random|popular|adversarial)\.json"
    return files_of(folder, names, ("coco", "annotations"), "coco_pope_random.json")


@data_format(
    "pope",
    takes="FOLDER",
    splits=lambda folder: tuple(_files(folder)),
    fingerprint=lambda folder: digest_of_files(_files(folder)),
    lone=True,
)
def read_pope(folder: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("pope", fields)
    photos = first_folder(folder, _PICTURES)
    for where, record in _records(_files(folder)[split]):
        own = number_of(record, "question_id", where)
        picture, question = text_of(record, "image", where), text_of(record, "text", where)
        label = record.get("label")
        # The official program takes any other label for a yes.
        if label not in YES_NO:
            raise ValueError(f"{where} (question_id {own}): label is {label!r:.60}; expected yes or no")
        yield Sample(own, (f"{photos}/{picture}",), question, (label,), YES_NO, where)


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """The records with file and line: JSON lines or, as in the files made by SEEM, one list."""
    if not read_text(str(file)).lstrip().startswith("["):
        yield from lines_of(str(file))
        return
    for i, record in enumerate(read_json(file)):
        yield f"{file} [{i}]", record
