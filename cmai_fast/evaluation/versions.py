"""The versions and the machine of a result."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
import transformers

import cmai_fast


def versions() -> dict[str, str]:
    """Versions of code and data, the commit if this is a checkout, and the machine."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(cmai_fast.__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False,
        ).stdout.strip()  # fmt: skip
    except OSError:  # no git here
        commit = ""
    data = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        data["easy_vqa"] = metadata.version("easy-vqa")
    return {
        **data,
        "cmai_fast": cmai_fast.__version__,
        "commit": commit or "not a checkout",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
