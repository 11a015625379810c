"""The CUDA kernels compiled for the host: see `cuda_runtime.h` beside this, which stands for CUDA's own."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_BUILT = _HERE.parents[1] / "build" / "emulated"


@functools.cache
def module() -> Any:
    """The module, compiled where it is not yet, once for all processes; skips the test where that is not possible."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("the emulation of the CUDA kernels needs g++ on x86-64")
    import pybind11

    includes = [f"-I{path}" for path in (_HERE, _CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    # As nvcc is asked to: no contraction. Vectors are read through pointers to other types.
    flags = ["-O1", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-mf16c"]
    sources = [*sorted(_CSRC.glob("cuda_*.cu")), _HERE / "module.cpp"]
    flags.append(f"-DPYBIND11_OF={pybind11.__version__}")  # a new version may come into the old folder
    command = [compiler, "-x", "c++", "-shared", "-fPIC", *flags, *includes, *map(str, sources), "-o"]
    _BUILT.mkdir(parents=True, exist_ok=True)
    with open(_BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = _BUILT / f"{_state_of(command)}.so"
        if not target.exists():
            for old in _BUILT.glob("*.so"):
                old.unlink()
            part = target.with_suffix(".partial")
            subprocess.run([*command, str(part)], check=True)
            os.replace(part, target)
        spec = importlib.util.spec_from_file_location("emulated", target)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded


def _state_of(command: list[str]) -> str:
    """Of all that the result depends on: sources, compiler, flags, Python, pybind11."""
    state = hashlib.sha256("\n".join(command).encode())
    state.update(subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout)
    state.update(sysconfig.get_config_var("EXT_SUFFIX").encode())
    for file in sorted(file for folder in (_CSRC, _HERE) for file in folder.iterdir() if file.is_file()):
        state.update(file.name.encode() + b"\0" + file.read_bytes())
    return state.hexdigest()[:16]
