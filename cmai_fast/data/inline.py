"""Pictures in records: a path, bytes, base64, or a picture in memory. Nothing is decoded here."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# How PNG, JPEG, GIF, WebP, BMP and TIFF begin in base64. JPEG's looks like a path, but a path is not that long.
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkqA|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")


def picture_of(value: Any, name: str, folder: Path | None) -> Any:
    """The value for `Sample.images`: an absolute path, {"bytes", "path"}, or an unchanged picture or array.

    Args:
        name: its name in errors.
        folder: the folder that paths are relative to; None leaves a relative path unchanged.

    Raises:
        ValueError: a URL, broken base64, or a value that is not a picture.
    """
    if isinstance(value, (str, os.PathLike)):
        return _path(os.fspath(value), name, folder)
    if isinstance(value, (bytes, bytearray)):
        return _encoded(bytes(value), name)
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is not None:
            return {**_encoded(data, name), "path": path}
        if path is not None:
            return _path(path, name, folder)
        raise ValueError(
            f'{name} is a dict with the keys {", ".join(map(str, value)) or "none"}; expected "bytes" or "path"'
        )
    if hasattr(value, "__array__") or (hasattr(value, "convert") and hasattr(value, "mode")):
        return value
    raise ValueError(
        f"{name} is {value!r:.60} ({type(value).__name__}); expected a path, bytes, base64, a PIL picture or an array"
    )


def _path(text: Any, name: str, folder: Path | None) -> Any:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is {text!r:.60}; expected the path of a picture")
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"{name} is a data URL {head[:40]!r}; expected data:image/...;base64,...")
        return _encoded(_decoded(body, name), name)
    if _BASE64.fullmatch(text):
        return _encoded(_decoded(text, name), name)
    if _URL.match(text):
        raise ValueError(f"{name} is the URL {text[:80]!r}; nothing is downloaded. Save the picture and give its path")
    path = os.path.expanduser(text)
    return path if folder is None else os.path.join(os.path.abspath(folder), path)


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is base64 that cannot be decoded ({error}); is it cut off?") from None


def _encoded(data: Any, name: str) -> dict[str, Any]:
    if not isinstance(data, (bytes, bytearray)) or not data:
        raise ValueError(f"{name} has the bytes {data!r:.40}; expected those of a PNG or JPEG file")
    return {"bytes": bytes(data), "path": None}
