"""Atomic writes of files and folders, and values as JSON types."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> Path:
    """Writes `text` (UTF-8) to `path` atomically, as `write_bytes` does."""
    return write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> Path:
    """Writes `data` to `path` atomically: readers see the old file or the complete new one, never a part.

    The data are written to a temporary file in the same folder (a rename is atomic only within one file system) and
    flushed to disk before the rename. Missing parent folders are created.

    Raises:
        OSError: names the path and the reason (full disk, no permission); the old file is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # also Ctrl-C, so that no temporary file is left
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        state = "the file that was there is unchanged" if path.is_file() else "no file was left there"
        message = f"could not write {path}: {reason}; {state}. Free some space or name another folder, and run again."
        raise OSError(error.errno, message) from error
    return path


def write_folder(folder: Path, save: Callable[[Path], Any]) -> Path:
    """Replaces `folder` by what `save(staging)` writes, once that is complete."""
    folder = Path(folder)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # free the space
        raise
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return folder


def plain(value: Any, where: str = "results") -> Any:
    """`value` as JSON types, as it would be read back. `where` is its key, named in the TypeError for other types."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return plain(value.tolist(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold; give numbers, text, lists or dicts")
