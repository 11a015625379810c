"""`cmai-fast info`: versions, devices, backends and bundled models."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

EXAMPLE = "cmai-fast info --json"

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


def info(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, operator backends and bundled models."""
    facts = _gather()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    # Text and not markup, which would drop the brackets of cmai-fast[triton]; folded and not cut, so that a path can be
    # copied.
    table = Table(show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for heading, entries in facts.items():
        for name, value in entries.items():
            table.add_row(Text(heading), Text(name), Text(value))
            heading = ""
        table.add_section()
    Console(highlight=False).print(table)


def _gather() -> dict[str, dict[str, str]]:
    import cmai_fast
    from cmai_fast.models import BUNDLED, resolve

    return {
        "versions": {
            "cmai_fast": cmai_fast.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "devices": _devices(),
        "backends": _backends(),
        "extension": _extension(),
        "models": {name: str(resolve(name)) for name in BUNDLED},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(i)
        capability = f"compute capability {properties.major}.{properties.minor}"
        found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
    return found


def _extension() -> dict[str, str]:
    """How the C++ and CUDA kernels were built; the backends say why one cannot run."""
    from cmai_fast import ops

    return ops.build_report() or {"built": f"no: {ops.backend_report()['cpu']}"}


def _backends() -> dict[str, str]:
    """Every backend's state, and the one in use; an unavailable choice is shown, not raised."""
    from cmai_fast import ops

    try:
        chosen = ops.chosen_backend()
    except RuntimeError as error:
        chosen = str(error)
    return {**ops.backend_report(), "in use": chosen}
