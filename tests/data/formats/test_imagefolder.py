"""Folders of pictures with metadata, and splits of such folders."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from cmai_fast.data.sources import DataSource


def folder_at(path, names, suffix):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path / name)
    records = [{"file_name": n, "question": f"{n}?", "answer": "red"} for n in names]
    if suffix == "csv":
        rows = ["file_name,question,answer", *(",".join(r.values()) for r in records)]
        (path / "metadata.csv").write_text("\n".join(rows))
    else:
        (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return DataSource(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_metadata_names_pictures_of_its_folder(suffix, tmp_path):
    source = folder_at(tmp_path / "shapes", ["a.png", "more/b.png"], suffix)
    source.check()
    samples = source.load("test")
    assert [s.images for s in samples] == [(str(tmp_path / "shapes" / n),) for n in ("a.png", "more/b.png")]
    assert samples[0].where == f"{tmp_path}/shapes/metadata.{suffix} line {1 if suffix == 'jsonl' else 2}"
    before = source.fingerprint()
    (tmp_path / "shapes" / f"metadata.{suffix}").write_text("")
    assert source.fingerprint() != before
    with pytest.raises(ValueError, match="shapes holds no records"):
        source.check()


def test_several_pictures_and_a_missing_one(tmp_path):
    source = folder_at(tmp_path, ["a.png", "b.png"], "jsonl")
    (tmp_path / "metadata.jsonl").write_text('{"file_names": ["a.png", "b.png"], "prompt": "same?"}')
    assert len(source.load("test")[0].images) == 2
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"^1 of 2 pictures are missing, .*: .*b\.png \(.*metadata\.jsonl line 1\)"):
        source.check()


def test_a_folder_of_such_folders_is_split_by_their_names(tmp_path):
    folder_at(tmp_path / "train", ["a.png"], "jsonl")
    folder_at(tmp_path / "test", ["b.png", "c.png"], "csv")
    source = DataSource(str(tmp_path))
    source.check()
    assert (len(source.load("train")), len(source.load("test"))) == (1, 2)


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl or metadata\.csv; expected records .* 'file_name'"):
        DataSource(f"imagefolder:{tmp_path}").check()
