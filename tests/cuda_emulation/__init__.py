"""The CUDA kernels compiled for the host: see `cuda_runtime.h` beside this, which stands for CUDA's own."""

from __future__ import annotations

import functools
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"


@functools.cache
def module() -> Any:
    """The module, compiled at the first call; skips the test where that is not possible."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("the emulation of the CUDA kernels needs g++ on x86-64")
    import pybind11

    includes = [f"-I{path}" for path in (_HERE, _CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    # As nvcc is asked to: no contraction. Vectors are read through pointers to other types.
    flags = ["-O1", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-mf16c"]
    sources = [*sorted(_CSRC.glob("cuda_*.cu")), _HERE / "module.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "emulated.so"
        command = [compiler, "-x", "c++", "-shared", "-fPIC", *flags, *includes, *sources, "-o", target]
        subprocess.run(command, check=True)
        spec = importlib.util.spec_from_file_location("emulated", target)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return loaded
