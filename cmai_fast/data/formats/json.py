"""JSON: a list of records, or an object with the list under `data`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format, read_text
from cmai_fast.data.records import sample_of
from cmai_fast.data.sample import Sample

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


@data_format("json", suffixes=(".json",))
def read_json(path: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    text, folder = read_text(path), Path(path).parent
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            hint = "; a file with one record per line has the suffix .jsonl"
        empty = "it is empty" if not text.strip() else error.msg
        raise ValueError(f"{path} line {error.lineno} is not complete JSON ({empty}){hint}") from None
    line, last = 1, 0
    for place, (start, record) in enumerate(_items(text, _start_of_list(text, path))):
        line, last = line + text.count("\n", last, start), start
        yield sample_of(record, f"{path} line {line}", place, folder, fields)


def _start_of_list(text: str, path: str) -> int:
    """The position of the first item of the list of records."""
    at = _skip(text, 0)
    if text[at] == "{":
        at = _skip(text, at + 1)
        while text[at] == '"':
            key, at = _DECODER.raw_decode(text, at)
            value = _skip(text, _skip(text, at) + 1)  # past the colon
            if key == "data" and text[value] == "[":
                return _skip(text, value + 1)
            at = _skip(text, _DECODER.raw_decode(text, value)[1])
            at = _skip(text, at + 1) if text[at] == "," else at
    if text[at] != "[":
        raise ValueError(f'{path} has no list of records; expected [{{...}}, ...] or {{"data": [{{...}}, ...]}}')
    return _skip(text, at + 1)


def _items(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """The items of a valid list, each with its start position."""
    while text[at] != "]":
        item, end = _DECODER.raw_decode(text, at)
        yield at, item
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
