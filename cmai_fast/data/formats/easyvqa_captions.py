"""Captions of easy-VQA's pictures ("a teal circle"), made from what its questions say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version

from cmai_fast.data.easyvqa import COLORS, SHAPES, SPLITS, EasyVQA
from cmai_fast.data.formats.format import data_format
from cmai_fast.data.formats.official import no_fields
from cmai_fast.data.sample import Sample

CAPTIONS = tuple(f"a {color} {shape}" for color in COLORS for shape in SHAPES)


@data_format(
    "easyvqa-captions",
    takes="",
    splits=lambda place: SPLITS,
    fingerprint=lambda place: f"easy-vqa captions {version('easy-vqa')}",
)
def read_easyvqa_captions(place: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("easyvqa-captions", fields)
    data = EasyVQA(split)
    for picture, (colour, shape) in data.facts().items():
        if colour is not None and shape is not None:
            caption = f"a {COLORS[colour]} {SHAPES[shape]}"
            yield Sample(picture, (data.picture(picture),), "", (caption,), CAPTIONS)
