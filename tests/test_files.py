"""Files appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from cmai_fast.files import write_bytes, write_folder, write_text


def test_a_model_folder_replaces_an_older_one_whole(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").touch()
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "litter").touch()
    write_folder(tmp_path / "model", lambda d: (d / "new").touch())
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["new"]


def test_a_file_is_replaced_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.bin"
    write_text("é", path)
    assert path.read_bytes() == "é".encode()
    write_bytes(b"\x00new", path)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"could not write .*a\.bin: No space left.*unchanged"):
        write_bytes(b"newer", path)
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"] and path.read_bytes() == b"\x00new"
