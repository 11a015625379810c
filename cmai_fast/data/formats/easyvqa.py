"""easy-VQA by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from cmai_fast.data.easyvqa import SPLITS, EasyVQA
from cmai_fast.data.formats.format import data_format


@data_format(
    "easyvqa", takes="", splits=lambda place: SPLITS, fingerprint=lambda place: f"easy-vqa {version('easy-vqa')}"
)
def read_easyvqa(place: str, split: str, fields: Mapping[str, str]) -> EasyVQA:
    if fields:
        raise ValueError(f"easyvqa has fixed keys; leave out --map {next(iter(fields))}=...")
    return EasyVQA(split)
