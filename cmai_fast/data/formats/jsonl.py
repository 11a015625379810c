"""JSON lines: one record per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format, read_text
from cmai_fast.data.records import sample_of
from cmai_fast.data.sample import Sample


@data_format("jsonl", suffixes=(".jsonl", ".ndjson"))
def read_jsonl(path: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    folder = Path(path).parent
    for place, (where, record) in enumerate(lines_of(path)):
        yield sample_of(record, where, place, folder, fields)


def lines_of(path: str) -> Iterator[tuple[str, Any]]:
    """The value of each line that is not blank, with file and line.

    Raises:
        ValueError: a line that is not complete JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() also breaks at U+2028 inside a text
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            one = line.strip() in "[{"
            hint = "a file with one JSON list has the suffix .json" if one else "complete the line or remove it"
            raise ValueError(f"{where} is not a complete JSON object ({error}); {hint}") from None
        yield where, record
