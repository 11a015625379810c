"""How setup.py builds: only what changed, headers included, and with the reason where it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATH = os.pathsep.join([str(BIN), os.environ["PATH"]])
_MODULE = """#include <Python.h>
#include "own.h"
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  PyModule_AddIntConstant(made, "number", NUMBER + other());
  return made;
}
"""
needs_ninja = pytest.mark.skipif(shutil.which("ninja", path=PATH) is None, reason="ninja is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this setup.py, and sources that compile in a second."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "cmai_fast").mkdir()
    (tmp_path / "cmai_fast" / "__init__.py").touch()
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "README.md").write_text(
        "[docs](docs/a.md#b) [docs/b.md](docs/b.md) ![x](y.png) [here](#x) [w](https://w.org)"
    )
    (tmp_path / "csrc" / "own.h").write_text("#define NUMBER 1\nint other();\n")
    (tmp_path / "csrc" / "module.cpp").write_text(_MODULE)
    (tmp_path / "csrc" / "other.cpp").write_text("int other() { return 40; }\n")
    (tmp_path / "csrc" / "cuda_bindings.cpp").touch()
    return tmp_path


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "MAX_JOBS", "CMAI_FAST_CUDA")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    own |= {"PATH": PATH, "CMAI_FAST_CUDA": "0", **environment}
    return subprocess.run(command, cwd=project, env=own, capture_output=True, text=True)


def number(project: Path) -> int:
    code = "from cmai_fast import _C; print(_C.number)"
    run = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, env={"PATH": PATH})
    assert not run.returncode, run.stderr
    return int(run.stdout)


def objects(project: Path) -> dict[str, int]:
    return {o.name: o.stat().st_mtime_ns for o in (project / "build").rglob("*.o")}


@needs_ninja
@needs_compiler
def test_ninja_builds_what_changed_and_what_reads_a_changed_header(project: Path):
    assert not build(project).returncode
    first = objects(project)
    assert number(project) == 41 and set(first) == {"module.o", "other.o"}
    assert not build(project).returncode and objects(project) == first

    (project / "csrc" / "own.h").write_text("#define NUMBER 2\nint other();\n")
    assert not build(project).returncode
    second = objects(project)
    assert number(project) == 42
    assert second["module.o"] > first["module.o"] and second["other.o"] == first["other.o"]


@needs_compiler
def test_without_ninja_it_builds_as_well(project: Path, tmp_path: Path):
    programs = tmp_path / "programs"
    programs.mkdir()
    own = [str(sysconfig.get_config_var(name) or "g++").split()[0] for name in ("CC", "CXX", "LDSHARED", "LDCXXSHARED")]
    for name in {"g++", "gcc", "as", "ld", *own}:  # Debian's Python calls x86_64-linux-gnu-g++
        if found := shutil.which(name):
            (programs / Path(name).name).symlink_to(found)
    run = build(project, PATH=str(programs))
    assert not run.returncode and "ninja" not in run.stdout, run.stderr
    assert number(project) == 41


@needs_compiler
def test_code_that_does_not_compile_is_noted_and_the_next_build_forgets_it(project: Path):
    (project / "csrc" / "other.cpp").write_text("this is no C++\n")
    run = build(project)
    assert run.returncode == 0  # the extension is optional
    note = project / "cmai_fast" / "_C.txt"
    assert "failed with exit code" in note.read_text() or "ninja ended with" in note.read_text()
    (project / "csrc" / "other.cpp").write_text("int other() { return 40; }\n")
    assert not build(project).returncode and not note.exists() and number(project) == 41


def test_a_missing_compiler_is_named_where_it_can_be_read_later(project: Path):
    run = build(project, CXX="/nowhere/c++")
    assert run.returncode == 0, run.stderr
    note = (project / "cmai_fast" / "_C.txt").read_text()
    assert "the C++ compiler /nowhere/c++ was not found; install it" in note and note.count("\n") == 1


def test_cuda_without_a_compiler_names_the_compiler_and_not_the_toolkit(project: Path):
    run = build(project, CXX="/nowhere/c++", CMAI_FAST_CUDA="1")
    assert run.returncode
    assert "CMAI_FAST_CUDA=1, but the C++ compiler /nowhere/c++ was not found" in run.stderr
    assert "toolkit" not in run.stderr


def test_cuda_without_nvcc_names_the_toolkit(project: Path, tmp_path: Path):
    # One that fails is as good as none.
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (programs / "nvcc").chmod(0o755)
    run = build(project, CMAI_FAST_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode and "Install the CUDA toolkit, or name it by CUDA_HOME" in run.stderr


def test_the_long_description_has_no_links_that_an_index_cannot_follow(project: Path):
    command = [sys.executable, "setup.py", "--long-description"]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("docs (docs/a.md) docs/b.md x here [w](https://w.org)")


def test_a_source_distribution_holds_what_the_tests_read():
    held = (ROOT / "MANIFEST.in").read_text()
    for folder in ("benchmarks", "csrc", "docs", "tests"):
        assert f"graft {folder}\n" in held, folder
