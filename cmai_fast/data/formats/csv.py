"""CSV with a header line; `.tsv` is separated by tabs. An empty cell counts as missing."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format, read_text
from cmai_fast.data.records import LISTS, listed, sample_of
from cmai_fast.data.sample import Sample

_CELL = 2**31 - 1  # characters; a picture in base64 exceeds the module's default of 131,072


@data_format("csv", suffixes=(".csv", ".tsv"))
def read_csv(path: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    several = {fields.get(key, key) for key in LISTS}
    for place, (line, record) in enumerate(rows_of(path)):
        where = f"{path} line {line}"
        record = {k: listed(v, f"{where}: {k}") if k in several else v for k, v in record.items()}
        yield sample_of(record, where, place, Path(path).parent, fields)


def rows_of(path: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, {column: cell}) of each row."""
    text = read_text(path)
    separator = "\t" if path.lower().endswith(".tsv") else ","
    before = csv.field_size_limit(_CELL)  # a process-wide setting, which is restored
    try:
        return list(_rows(path, csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), separator))
    finally:
        csv.field_size_limit(before)


def _rows(path: str, reader: Any, separator: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1  # a quoted cell may contain line breaks
            if not cells:
                continue
            if header is None:
                header = _header(path, cells, separator)
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path} line {start} has {len(cells)} cells; the header has {len(header)}: {', '.join(header)}. "
                    f"Put text that holds {separator!r} in double quotes"
                )
            yield start, {k: v if v.strip() else None for k, v in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path} line {line}: {error}; is a closing quote missing?") from None


def _header(path: str, cells: list[str], separator: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = {name for name in header if header.count(name) > 1}
    if "" in header or twice:
        what = f"two columns {sorted(twice)[0]!r}" if twice - {""} else "a column without a name"
        raise ValueError(f"{path} line 1 has {what}; expected one name per column, each once")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t,"):
        raise ValueError(
            f"{path} line 1 is one column {header[0]!r}; expected columns separated by "
            f"{'tabs (.tsv)' if separator != ',' else 'commas (.csv)'}"
        )
    return header
