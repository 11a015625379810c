"""Files that appear whole or not at all, and values as JSON holds them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> Path:
    """Puts `text` (UTF-8) at `path` in one move, as `write_bytes` does."""
    return write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> Path:
    """Puts `data` at `path` in one move: readers see the old file or the whole new one, never a part.

    The data go to a temporary file in the same folder (a rename is atomic only inside one file system), reach the
    disk, and take the name last. Missing parent folders are made.

    Raises:
        OSError: naming the path and the reason (full disk, no permission); what stood there before is untouched.
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
        except BaseException:  # Ctrl-C too must leave no litter
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        state = "the file that was there is unchanged" if path.is_file() else "no file was left there"
        message = f"could not write {path}: {reason}; {state}. Free some space or name another folder, and run again."
        raise OSError(error.errno, message) from error
    return path


def write_folder(folder: Path, save: Callable[[Path], Any]) -> Path:
    """Puts what `save(staging)` writes at `folder` in one move; what stood there before is replaced only then."""
    folder = Path(folder)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the room
        raise
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    return folder


def plain(value: Any, where: str = "results") -> Any:
    """`value` in the types of JSON, as it would be read back; `where` is its key, for the TypeError on other types."""
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
