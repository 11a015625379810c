"""Builds the compiled extension `cmai_fast._C`; everything else about the package is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, neither PyTorch nor CUDA. Without a compiler the package installs all
the same and runs its reference operators; the reason goes into `cmai_fast/_C.txt`, which their first use and
`cmai-fast info` show, since pip hides what a build prints. CUDA kernels are built if nvcc is found (CUDA_HOME, PATH,
/usr/local/cuda). Where ninja is on the PATH, it compiles what changed, headers included. Environment variables:

    CMAI_FAST_CUDA=0|1              0: without CUDA; 1: a missing or failing compiler is an error
    CMAI_FAST_CUDA_ARCHS="80;90"    the architectures, and PTX of the last; without it those of ARCHS that nvcc knows
    MAX_JOBS                        how many compilers run at once; without it one per core
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, CompileError, ExecError, OptionError, SetupError

# No -march: a wheel runs on other machines than the one that built it; kernels choose their instructions as they load.
# No contraction: a fused multiply-add rounds differently, and results should not depend on the processor.
# No trapping: nobody reads the floating-point exception flags, and GCC vectorises no comparison that might raise one.
_UNIX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fopenmp-simd"]
_NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false"]
ARCHS = ("80", "90", "100")

ParallelCompile("MAX_JOBS").install()


class Nvcc:
    """The CUDA compiler that was found and what it is asked to build for."""

    def __init__(self) -> None:
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        folders = [os.path.join(home, "bin") for home in homes if home]
        path = os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
        program = shutil.which("nvcc", path=path)
        if program is None:
            raise SetupError("nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda")
        self.program = program
        release = re.search(r"release ([\d.]+)", self._ask("--version"))
        self.version = release[1] if release else "of unknown version"
        wanted = [arch for arch in re.split(r"[;, ]+", os.environ.get("CMAI_FAST_CUDA_ARCHS", "")) if arch]
        known = set(re.findall(r"compute_(\w+)", self._ask("--list-gpu-arch")))
        if unknown := {arch for arch in wanted if arch.rstrip("af") not in known}:
            raise OptionError(
                f"CMAI_FAST_CUDA_ARCHS names {', '.join(sorted(unknown))}; nvcc {self.version} knows {sorted(known)}"
            )
        self.archs = wanted or [arch for arch in ARCHS if arch in known]
        # nvcc may be a script that calls the real one elsewhere: its plan says where that one's libraries are.
        plan = subprocess.run([program, "--dryrun", "probe.cu"], capture_output=True, text=True, check=True).stderr
        libraries = re.search(r"LIBRARIES=(.*)", plan)
        self.libraries = shlex.split(libraries[1]) if libraries else []

    def _ask(self, option: str) -> str:
        return subprocess.run([self.program, option], capture_output=True, text=True, check=True).stdout

    def command(self, source: str, target: str) -> list[str]:
        newest = self.archs[-1]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        options = [*_NVCC_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", *codes, "-Icsrc"]
        return [self.program, *options, "-c", source, "-o", target]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _compile_by(ninja: str, compiler: Any, nvcc: Nvcc | None) -> Callable[..., list[str]]:
    """`compiler.compile`, but by ninja: what is up to date, by its command and all files it read, is not made again.

    Objects stay in build/, also when pip builds in a folder of its own.
    """

    def escaped(text: str) -> str:
        return text.replace("$", "$$")

    def path(text: str) -> str:
        return escaped(text).replace(" ", "$ ").replace(":", "$:")

    def compile(
        sources: list[str],
        output_dir: str | None = None,
        macros: list[tuple[str, str | None]] | None = None,
        include_dirs: list[str] | None = None,
        debug: bool = False,
        extra_preargs: list[str] | None = None,
        extra_postargs: list[str] | None = None,
        depends: list[str] | None = None,
    ) -> list[str]:
        folder = os.path.join("build", f"ninja-{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
        _, objects, extra_postargs, options, build = compiler._setup_compile(
            folder, macros, include_dirs, sources, depends, extra_postargs
        )
        arguments = compiler._get_cc_args(options, debug, extra_preargs)
        lines = ["rule object", "  command = $line", "  depfile = $out.d", "  deps = gcc", "  description = $in"]
        for target in objects:
            source, suffix = build[target]
            if suffix == ".cu" and nvcc is not None:
                command = [*nvcc.command(source, target), "-MD", "-MF", f"{target}.d"]
            else:
                command = [*compiler.compiler_so_cxx, *arguments, source, "-o", target, *extra_postargs]
                command += ["-MMD", "-MF", f"{target}.d"]
            lines += [f"build {path(target)}: object {path(source)}", f"  line = {escaped(shlex.join(command))}"]
        os.makedirs(folder, exist_ok=True)
        script = os.path.join(folder, "build.ninja")
        with open(script, "w") as file:
            file.write("\n".join([f"builddir = {path(folder)}", *lines, ""]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        code = subprocess.run([ninja, "-f", script, *jobs]).returncode
        if code:
            raise CompileError(f"ninja ended with {code}; the compiler's message is above")
        return objects

    return compile


class build_ext(pybind11_build_ext):
    """Adds the optimisation flags of the compiler in use, OpenMP where it compiles and links, CUDA where nvcc is."""

    failure: str | None = None

    def run(self) -> None:
        super().run()
        # Next to the extension, or where it would be.
        note = os.path.join(os.path.dirname(self.get_ext_fullpath("cmai_fast._C")), "_C.txt")
        if os.path.exists(note):
            os.unlink(note)
        if self.failure is not None:
            os.makedirs(os.path.dirname(note), exist_ok=True)
            with open(note, "w") as file:
                file.write(f"{self.failure}\n")

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, CompileError) as error:
            self.failure = self._no_compiler() or f"{_one_line(error)} (pip install -v shows the compiler's output)"
            raise
        self.failure = None

    def _no_compiler(self) -> str | None:
        """Why there is no C++ compiler, or None."""
        if self.compiler.compiler_type != "unix":
            return None
        program = self.compiler.compiler_so_cxx[0]
        if shutil.which(program) is None:
            return f"the C++ compiler {program} was not found; install it (Debian: apt install g++), or set CXX"
        return None

    def build_extensions(self) -> None:
        unix = self.compiler.compiler_type == "unix"
        flags = _UNIX_FLAGS if unix else ["/O2"]
        # No -fopenmp for the linker: the extension must come to the one OpenMP runtime that PyTorch has loaded,
        # whatever its name, and not bring a second with a thread pool of its own.
        openmp = ["-fopenmp"] if unix and sys.platform != "darwin" and self._has_openmp() else []
        (extension,) = self.extensions
        extension.extra_compile_args += flags + openmp
        wanted = os.environ.get("CMAI_FAST_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise SetupError(f"CMAI_FAST_CUDA is {wanted!r}, expected 0 or 1, or nothing: CUDA if nvcc is there")
        # setuptools looks at the sources alone, and would keep what was built with another wish.
        self.force = self.force or any(name in os.environ for name in ("CMAI_FAST_CUDA", "CMAI_FAST_CUDA_ARCHS"))
        compiler = self._no_compiler()
        if wanted == "1" and compiler is not None:
            raise SetupError(f"CMAI_FAST_CUDA=1, but {compiler}. nvcc needs it, too")
        missing = "CMAI_FAST_CUDA=0 at build" if wanted == "0" else compiler or self._build_with_cuda(extension)
        if missing is None:
            return
        if wanted == "1":
            raise SetupError(f"CMAI_FAST_CUDA=1, but {missing}; CMAI_FAST_CUDA=0 builds without")
        self._describe(extension, f"none: {missing}", "")
        with self._by_ninja(None):
            super().build_extensions()

    @contextmanager
    def _by_ninja(self, nvcc: Nvcc | None) -> Iterator[None]:
        """Inside, ninja compiles where it is on the PATH and knows what to do with the compiler."""
        ninja = shutil.which("ninja")
        if ninja is None or self.compiler.compiler_type != "unix":
            yield
            return
        plain = self.compiler.compile
        self.compiler.compile = _compile_by(ninja, self.compiler, nvcc)
        self.force = True  # setuptools knows less of what changed
        try:
            yield
        finally:
            self.compiler.compile = plain

    def _build_with_cuda(self, extension: Pybind11Extension) -> str | None:
        """None, or the reason why CUDA cannot be built; the extension is then unchanged."""
        try:
            nvcc = Nvcc()
        except (SetupError, OSError, subprocess.CalledProcessError) as error:
            return f"{error}. Install the CUDA toolkit, or name it by CUDA_HOME"
        before = {
            name: getattr(extension, name) for name in ("sources", "define_macros", "extra_link_args", "optional")
        }
        extension.sources = [*before["sources"], *sorted(glob("csrc/*.cu")), "csrc/cuda_bindings.cpp"]
        extension.define_macros = [*before["define_macros"], ("CMAI_FAST_WITH_CUDA", None)]
        # Its symbols stay inside: PyTorch has a CUDA runtime of its own.
        cudart = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        extension.extra_link_args = [*before["extra_link_args"], *nvcc.libraries, *cudart]
        extension.optional = False  # else setuptools would swallow the failure
        self._describe(extension, nvcc.version, ";".join(nvcc.archs))
        by_cpp = self.compiler._compile

        def compile_one(target: str, source: str, suffix: str, *rest: object) -> None:
            if suffix == ".cu":
                self.spawn(nvcc.command(source, target))
            else:
                by_cpp(target, source, suffix, *rest)

        self.compiler.src_extensions.append(".cu")
        self.compiler._compile = compile_one
        try:
            with self._by_ninja(nvcc):
                super().build_extensions()
        except (CCompilerError, ExecError, CompileError) as error:
            vars(extension).update(before)
            self.warn(f"cmai_fast is built without its CUDA kernels: {error}")
            return f"nvcc {nvcc.version}, {self.compiler.compiler_so_cxx[0]} or the linker failed: {_one_line(error)}"
        finally:
            self.compiler._compile = by_cpp
        return None

    def _describe(self, extension: Pybind11Extension, cuda: str, archs: str) -> None:
        """What `cmai-fast info` shows of this build."""
        quoted = {
            "CMAI_FAST_FLAGS": shlex.join(extension.extra_compile_args),
            "CMAI_FAST_CUDA": cuda,
            "CMAI_FAST_CUDA_ARCHS": archs,
            "CMAI_FAST_CUDA_FLAGS": shlex.join(_NVCC_FLAGS) if archs else "",
        }
        for name, text in quoted.items():
            escaped = text.replace("\\", "\\\\").replace('"', '\\"')
            extension.define_macros.append((name, f'"{escaped}"'))

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


def long_description() -> str:
    """The README for a package index, where links into the repository lead nowhere: their places stand as text."""
    with open("README.md", encoding="utf-8") as file:
        text = file.read()
    text = re.sub(r"!\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)([^)#]*)[^)]*\)", _as_text, text)


def _as_text(link: re.Match[str]) -> str:
    text, place = link.groups()
    return text if not place or place in text else f"{text} ({place})"


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        Pybind11Extension(
            "cmai_fast._C",
            sources=sorted(set(glob("csrc/*.cpp")) - {"csrc/cuda_bindings.cpp"}),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*.cu") + ["csrc/cuda_bindings.cpp"]),
            include_dirs=["csrc"],
            cxx_std=17,
            optional=True,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
