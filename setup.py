"""Builds the compiled extension `cmai_fast._C`; everything else about the package is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, neither PyTorch nor CUDA. Without a compiler the package installs all
the same, runs its reference operators, and says so at their first use.
"""

from __future__ import annotations

import os
import sys
import tempfile
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError

# No -march: a wheel runs on other machines than the one that built it; kernels choose their instructions as they load.
# No contraction: a fused multiply-add rounds differently, and results should not depend on the processor.
# No trapping: nobody reads the floating-point exception flags, and GCC vectorises no comparison that might raise one.
_UNIX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fopenmp-simd"]


class build_ext(pybind11_build_ext):
    """Adds the optimisation flags of the compiler in use, and OpenMP where it compiles and links."""

    def build_extensions(self) -> None:
        unix = self.compiler.compiler_type == "unix"
        flags = _UNIX_FLAGS if unix else ["/O2"]
        openmp = ["-fopenmp"] if unix and sys.platform != "darwin" and self._has_openmp() else []
        for extension in self.extensions:
            extension.extra_compile_args += flags + openmp
            extension.extra_link_args += openmp
        super().build_extensions()

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as file:
                file.write("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([source], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, os.path.join(folder, "probe"), extra_postargs=["-fopenmp"])
            except (CCompilerError, ExecError):
                return False
        return True


setup(
    ext_modules=[
        Pybind11Extension(
            "cmai_fast._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            optional=True,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
