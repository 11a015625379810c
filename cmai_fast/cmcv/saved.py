"""Weights and a record of them, as two files of a folder that belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cmai_fast.files import write_bytes, write_text


def write_pair(
    folder: str | Path, weights: str, record: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Writes the files `weights` (safetensors) and `record` (JSON), each atomically.

    The record holds the digest of the weights, so files of two interrupted saves are not mistaken for one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
    write_bytes(data, folder / weights)
    found = {**values, "sha256": hashlib.sha256(data).hexdigest()}
    write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", folder / record)


def read_record(folder: str | Path, weights: str, record: str, maker: str) -> dict[str, Any]:
    """The record of a folder. `maker` says in errors what writes such a folder.

    Raises:
        ValueError: a file is missing, or the record is no JSON object.
    """
    folder = Path(folder)
    for name in (weights, record):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; expected a folder written by {maker}")
    try:
        found = json.loads((folder / record).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, expected an object")
    except ValueError as error:
        raise ValueError(f"{folder / record} is damaged ({error}); {AGAIN}") from error
    return found


def read_weights(folder: str | Path, weights: str, record: str, digest: str) -> dict[str, Tensor]:
    """The tensors of a folder.

    Raises:
        ValueError: the file is damaged or not the one that the record was written with.
    """
    path = Path(folder) / weights
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{path} is not the file that {record} was written with: it is damaged, or a save was interrupted; {AGAIN}"
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} does not fit {record} ({error}); {AGAIN}") from error


AGAIN = "calibrate again (cmai-fast calibrate)"
