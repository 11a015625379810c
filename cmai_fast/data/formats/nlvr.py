"""NLVR (the first, with drawn shapes) in its official files: a statement about a picture, which is true or false.

Of the six arrangements of a picture, the first is used.

Source: Suhr et al., 2017, "A Corpus of Natural Language for Visual Reasoning"; https://github.com/lil-lab/nlvr.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import data_format
from cmai_fast.data.formats.jsonl import lines_of
from cmai_fast.data.formats.official import TRUTH, digest_of_files, files_of, no_fields, text_of, truth_of
from cmai_fast.data.sample import Sample
from cmai_fast.data.zipped import ZippedPicture


def _files(folder: str) -> dict[str, Path]:
    return files_of(folder, r"(train|dev|test)\.json", ("train", "dev", "test"), "dev.json or dev/dev.json")


@data_format(
    "nlvr",
    takes="FOLDER",
    splits=lambda folder: tuple(_files(folder)),
    fingerprint=lambda folder: digest_of_files(_files(folder)),
    lone=True,
)
def read_nlvr(folder: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("nlvr", fields)
    file = _files(folder)[split]
    pictures = _Pictures(file.parent.absolute())
    for where, record in lines_of(str(file)):
        name = text_of(record, "identifier", where)
        picture = pictures.find(str(record.get("directory", "")), f"{split}-{name}-0.png")
        sentence, answers = text_of(record, "sentence", where), truth_of(record, f"{where} (identifier {name!r})")
        yield Sample(name, (picture,), sentence, answers, TRUTH, where)


class _Pictures:
    """The pictures beside a file of records: in `images/DIRECTORY/`, in `images/`, beside the file, or in a zip."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def find(self, directory: str, name: str) -> Any:
        """A path or `ZippedPicture`; the path of the official layout if there is no such picture."""
        places = [os.path.join(self.folder, place, name) for place in (f"images/{directory}", "images", "")]
        found = next((place for place in places if os.path.isfile(place)), None)
        return found or self._zipped.get(name) or places[0]

    @cached_property
    def _zipped(self) -> dict[str, ZippedPicture]:
        """The pictures in zip archives, by their names without folders."""
        found: dict[str, ZippedPicture] = {}
        for file in sorted(Path(self.folder).glob("*.zip")):
            try:
                with zipfile.ZipFile(file) as archive:
                    members = archive.namelist()
            except zipfile.BadZipFile as error:
                raise ValueError(f"{file} cannot be read ({error}); expected a complete zip archive") from None
            for member in members:
                found.setdefault(member.rpartition("/")[2], ZippedPicture(str(file), member))
        return found
