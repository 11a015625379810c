"""COCO captions in the official files of 2014 and 2017, or in Karpathy's `dataset_coco.json`: one sample per image.

Source: Chen et al., 2015, "Microsoft COCO Captions"; https://cocodataset.org/#download.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format
from cmai_fast.data.formats.karpathy import SPLITS, read_karpathy
from cmai_fast.data.formats.official import (
    digest_of_files,
    files_of,
    first_folder,
    list_of,
    no_fields,
    number_of,
    read_json,
    text_of,
)
from cmai_fast.data.sample import Sample

_UNDER = ("annotations",)
_CAPTIONS = r"captions_((?:train|val)(?:2014|2017))\.json"
_KARPATHY = r"dataset_(coco)\.json"
_PICTURES = ("{}", "images/{}", "coco/{}", "images")


def _files(folder: str) -> dict[str, Path]:
    karpathy = files_of(folder, _KARPATHY, _UNDER)
    official = files_of(folder, _CAPTIONS, _UNDER, "" if karpathy else "captions_val2017.json or dataset_coco.json")
    return {split: karpathy["coco"] for split in SPLITS if karpathy} | official


def splits_of(folder: str) -> tuple[str, ...]:
    return tuple(_files(folder))


@data_format(
    "coco-captions",
    takes="FOLDER",
    splits=splits_of,
    fingerprint=lambda folder: digest_of_files(_files(folder)),
    lone=True,
)
def read_coco_captions(folder: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("coco-captions", fields)
    file = _files(folder)[split]
    if split in SPLITS:
        return read_karpathy(file, split, partial(_place, folder, {}))
    return _official(file, str(first_folder(folder, [place.format(split) for place in _PICTURES])))


def _place(folder: str, known: dict[str, str], record: dict[str, Any], where: str) -> tuple[int, str]:
    own = text_of(record, "filepath", where)
    if own not in known:
        known[own] = str(first_folder(folder, [place.format(own) for place in _PICTURES]))
    return number_of(record, "cocoid", where), f"{known[own]}/{text_of(record, 'filename', where)}"


def _official(file: Path, photos: str) -> Iterator[Sample]:
    """The images in the order of the file, each with its captions in the order of their ids."""
    value = read_json(file)
    captions: dict[int, list[tuple[int, str]]] = {}
    images = list_of(value, "images", file)
    for i, image in enumerate(images):
        captions[number_of(image, "id", f"{file} images[{i}]")] = []
    seen: dict[int, int] = {}
    for i, annotation in enumerate(list_of(value, "annotations", file)):
        where = f"{file} annotations[{i}]"
        own, image = number_of(annotation, "id", where), number_of(annotation, "image_id", where)
        if own in seen:
            raise ValueError(f"{where}: id {own} is also that of annotations[{seen[own]}]; expected one id per caption")
        seen[own] = i
        if image not in captions:
            raise ValueError(f"{where}: image_id {image} is not among the images of the file; get the file again")
        captions[image].append((own, text_of(annotation, "caption", where)))
    for i, image in enumerate(images):
        where = f"{file} images[{i}]"
        if not captions[image["id"]]:
            raise ValueError(f"{where}: image {image['id']} has no caption in the file; get the file again")
        texts = tuple(text for _, text in sorted(captions[image["id"]]))
        yield Sample(image["id"], (f"{photos}/{text_of(image, 'file_name', where)}",), "", texts, where=where)
