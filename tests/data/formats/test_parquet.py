"""Parquet files: with pyarrow where it is installed, else against a stand-in."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource

RECORDS = [
    {"image": {"bytes": b"\x89PNG", "path": None}, "question": "a?", "answers": ["x", "y"]},
    {"image": None, "question": "b?", "answers": ["z"]},
]
EXPECTED = [Sample(0, ({"bytes": b"\x89PNG", "path": None},), "a?", ("x", "y")), Sample(1, (), "b?", ("z",))]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    return tmp_path / "x.parquet"


def test_records_come_in_batches(file, monkeypatch):
    pyarrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    pyarrow.ArrowException = type("ArrowException", (Exception,), {})
    batches = [SimpleNamespace(to_pylist=lambda r=r: [r]) for r in RECORDS]
    parquet.ParquetFile = lambda path: SimpleNamespace(iter_batches=lambda: iter(batches))
    pyarrow.parquet = parquet
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    samples = DataSource(str(file)).load("test")
    assert samples == EXPECTED and samples[1].where == f"{file} row 2"

    def damaged(path):
        raise pyarrow.ArrowException("no magic bytes")

    parquet.ParquetFile = damaged
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read as parquet \(no magic bytes\)"):
        DataSource(str(file)).check()


def test_a_real_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reads real parquet files: pip install 'cmai-fast[parquet]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "x.parquet")
    assert DataSource(str(tmp_path / "x.parquet")).load("test") == EXPECTED
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        DataSource(str(tmp_path / "x.parquet")).check()


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_without_pyarrow_it_is_named(file):
    with pytest.raises(ValueError, match=r"pip install 'cmai-fast\[parquet\]'"):
        DataSource(str(file)).check()
    file.rename(file.with_name("test.parquet"))
    with pytest.raises(ValueError, match=r"pip install 'cmai-fast\[parquet\]'"):
        DataSource(str(file.parent)).check()
