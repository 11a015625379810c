"""Parquet (needs pyarrow); pictures as `datasets` stores them ({"bytes", "path"}) or as paths."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from cmai_fast.data.formats.format import data_format
from cmai_fast.data.records import sample_of
from cmai_fast.data.sample import Sample


def check(path: str) -> None:
    if "pyarrow" not in sys.modules and find_spec("pyarrow") is None:
        raise ValueError(f"{path} is a parquet file, which needs pyarrow: pip install 'cmai-fast[parquet]'")


@data_format("parquet", suffixes=(".parquet", ".pq"), check=check)
def read_parquet(path: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    check(path)
    import pyarrow
    from pyarrow import parquet

    folder, place = Path(path).parent, 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                yield sample_of(record, f"{path} row {place + 1}", place, folder, fields)
                place += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); expected a complete parquet file") from error
