"""The description of a format, and the registry of formats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cmai_fast.data.sample import Sample
from cmai_fast.registry import Registry

Read = Callable[[str, str, Mapping[str, str]], Iterable[Sample]]
R = TypeVar("R", bound=Read)


@dataclass(frozen=True)
class Format:
    """One format of data.

    Attributes:
        name: as in `--data NAME:PLACE`.
        read: `read(place, split, fields)` returns the samples. An iterable is read to its end and checked (unique ids,
            existing pictures). A `Sequence` other than a list or tuple is used unchanged, so it may load pictures on
            access. Errors name file and line. `split` is one of `splits`, or empty if a place is one set of records;
            `fields` maps our key names to those of the records.
        takes: the word after the colon in help: FILE, FOLDER, another word, or empty for a named data set. The
            existence of a FILE or FOLDER is checked before `read` is called.
        suffixes: the file suffixes of this format.
        splits: returns the splits of a place, by their own names; empty if it is one set of records.
        check: raises ValueError before anything is read, for example if a package is not installed.
        fingerprint: returns a text that changes when the records of a place change; by default a digest of the file,
            or of the files of records in the folder.
        lone: whether a split that is there alone is one set of records, which serves as any split but `train`.
    """

    name: str
    read: Read
    takes: str = "FILE"
    suffixes: tuple[str, ...] = ()
    splits: Callable[[str], tuple[str, ...]] = lambda place: ()
    check: Callable[[str], None] = lambda place: None
    fingerprint: Callable[[str], str] | None = None
    lone: bool = False


FORMATS: Registry[Format] = Registry(
    "data format", "cmai_fast.data.formats", frozenset({"format", "karpathy", "official"})
)


def data_format(
    name: str,
    *,
    takes: str = "FILE",
    suffixes: tuple[str, ...] = (),
    splits: Callable[[str], tuple[str, ...]] = lambda place: (),
    check: Callable[[str], None] = lambda place: None,
    fingerprint: Callable[[str], str] | None = None,
    lone: bool = False,
) -> Callable[[R], R]:
    """Decorator: registers a function as the `read` of a format; the arguments are those of `Format`."""

    def register(read: R) -> R:
        FORMATS.add(name, Format(name, read, takes, suffixes, splits, check, fingerprint, lone))
        return read

    return register


def read_text(path: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: not UTF-8; names the line of the first invalid byte.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def format_of_suffix(path: Path) -> Format:
    """The format of a file by its suffix.

    Raises:
        ValueError: no format has that suffix.
    """
    forms = [form for _, form in FORMATS.items()]
    for form in forms:
        if path.suffix.lower() in form.suffixes:
            return form
    known = ", ".join(sorted(suffix for form in forms for suffix in form.suffixes))
    raise ValueError(
        f"{path} ends in {path.suffix or 'no suffix'}; expected a file that ends in one of {known}, or the format "
        f"before the name, as in jsonl:{path}"
    )


def digest_of(path: str | Path) -> str:
    """A digest of a file's bytes."""
    with open(path, "rb") as file:
        value = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()
