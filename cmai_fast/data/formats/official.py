"""The files of known data sets in their official layouts: where they lie, and how a broken one is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.format import digest_of, read_text

TRUTH = ("true", "false")  # the answers of a statement


def files_of(folder: str, names: str, under: Sequence[str], expected: str = "") -> dict[str, Path]:
    """The files of records of each split.

    Args:
        names: a regular expression of file names; its group is the split.
        under: the names of subfolders that are searched too, in lower case.
        expected: the name of such a file; there has to be one.

    Raises:
        ValueError: two files of one split, or none if one is `expected`.
    """
    beside = [entry for entry in Path(folder).iterdir() if entry.name.lower() in under and entry.is_dir()]
    found: dict[str, Path] = {}
    for place in (Path(folder), *sorted(beside)):
        for file in sorted(place.iterdir()):
            match = re.fullmatch(names, file.name)
            if match is None or not file.is_file():
                continue
            split = match[1]
            if split in found:
                raise ValueError(f"{found[split]} and {file} are both the split {split}; keep one")
            found[split] = file
    if expected and not found:
        there = sorted(entry.name for entry in Path(folder).iterdir())
        shown = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        raise ValueError(f"{folder} holds {shown or 'nothing'}; expected files such as {expected} (docs/formats.md)")
    return found


def digest_of_files(files: Mapping[str, Path]) -> str:
    """A text that changes when one of these files does."""
    return " ".join(f"{name} {digest_of(file)}" for name, file in sorted(files.items()))


def first_folder(folder: str, places: Iterable[str]) -> Path:
    """The first of these subfolders that exists, else the first."""
    candidates = [Path(folder).absolute() / place for place in places]
    return next((place for place in candidates if place.is_dir()), candidates[0])


def read_json(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON file.

    Args:
        hook: replaces each object as soon as it is parsed, so that what is not needed takes no memory.

    Raises:
        ValueError: it is not complete; names the line and column.
    """
    text = read_text(str(path))
    try:
        return json.loads(text, object_hook=hook)
    except json.JSONDecodeError as error:
        what = "it is empty" if not text.strip() else error.msg
        raise ValueError(
            f"{path} line {error.lineno} column {error.colno}: not complete JSON ({what}); the copy may have been cut "
            "off: get the file again"
        ) from None


def list_of(value: Any, key: str, path: Path) -> list[Any]:
    """The list under `key` of a file's object.

    Raises:
        ValueError: there is none.
    """
    records = value.get(key) if isinstance(value, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{path} has no list {key!r}; expected the official file")
    return records


def number_of(record: Any, key: str, where: str) -> int:
    """The whole number under `key` of a record.

    Raises:
        ValueError: there is none.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key} is {value!r:.60}; expected a whole number, as in the official file")
    return value


def text_of(record: Any, key: str, where: str) -> str:
    """The text under `key` of a record.

    Raises:
        ValueError: there is none, or it is empty.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key} is {value!r:.60}; expected a text that is not empty. Correct or remove it")
    return value


def truth_of(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The answer to a statement, from its label; none if there is no label, as in hidden test sets.

    Raises:
        ValueError: a label that is neither true nor false.
    """
    label = record.get("label")
    if label is None:
        return ()
    text = str(label).lower()
    if text not in TRUTH:
        raise ValueError(f"{where}: label is {label!r:.60}; expected True or False")
    return (text,)


def no_fields(name: str, fields: Mapping[str, str]) -> None:
    """Raises ValueError if `--map` is given for a format whose keys are fixed."""
    if fields:
        raise ValueError(f"{name} has fixed keys; leave out --map {next(iter(fields))}=...")
