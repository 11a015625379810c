"""JSON lines: one record per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from cmai_fast.data.formats.format import data_format, read_text
from cmai_fast.data.records import sample_of
from cmai_fast.data.sample import Sample


@data_format("jsonl", suffixes=(".jsonl", ".ndjson"))
def read_jsonl(path: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    folder, place = Path(path).parent, 0
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() also breaks at U+2028 inside a text
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            hint = "; a file with one JSON list has the suffix .json" if line.strip() in "[{" else ""
            raise ValueError(f"{where} is not a complete JSON object ({error}){hint}") from None
        yield sample_of(record, where, place, folder, fields)
        place += 1
