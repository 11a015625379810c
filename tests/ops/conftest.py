"""Every implementation of the operators on images, and every device that is there."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.ops import cpu, cuda, reference

CSRC = Path(__file__).parents[2] / "csrc"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)

# An operator by name; it takes the operator's arguments, on the CPU.
Implementation = Callable[[str], Callable[..., None]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", *([GPU] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is there."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA kernels compiled for the host (see emulation/cuda_runtime.h)."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("the emulation of the CUDA kernels needs g++ on x86-64")
    import pybind11

    target = tmp_path_factory.mktemp("emulation") / "emulated.so"
    includes = [Path(__file__).parent / "emulation", CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-shared", "-fPIC", "-O1", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-mf16c"]
    sources = [*sorted(CSRC.glob("cuda_*.cu")), Path(__file__).parent / "emulation" / "module.cpp"]
    subprocess.run(
        [
            compiler,
            "-x",
            "c++",
            *flags,
            "-fvisibility=hidden",
            *(f"-I{path}" for path in includes),
            *sources,
            "-o",
            target,
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("emulated", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(planners: dict[str, Any]) -> Implementation:
    """The kernels of a backend, which must carry what they are asked."""

    def find(name: str) -> Callable[..., None]:
        def step(*args: Any, **kwargs: Any) -> None:
            kernel = planners[name](*args, **kwargs)
            assert kernel is not None, "the backend does not carry this"
            kernel(*args, **kwargs)

        return step

    return find


def on_gpu(implementation: Implementation) -> Implementation:
    """The same on a GPU, for arguments on the CPU."""

    def find(name: str) -> Callable[..., None]:
        def step(*args: Any, **kwargs: Any) -> None:
            mine = [*args, *kwargs.values()]
            there = [value.to("cuda") if isinstance(value, Tensor) else value for value in mine]
            implementation(name)(*there[: len(args)], **dict(zip(kwargs, there[len(args) :], strict=True)))
            for value, result in zip(mine, there, strict=True):
                if isinstance(value, Tensor):
                    value.copy_(result)

        return step

    return find


def _implementation(name: str, request: pytest.FixtureRequest) -> Implementation:
    if name == "in use":
        return lambda operator: getattr(ops, operator)
    if name == "reference":
        return lambda operator: getattr(reference, operator)
    if name == "cpu":
        return planned(cpu.KERNELS)
    if name == "cuda":
        return on_gpu(planned(cuda.KERNELS))
    launcher = cuda.make_launcher(request.getfixturevalue("emulated"), lambda index: True, lambda device: 0)
    return planned(cpu.planners(launcher, "cpu", "cuda_"))


_COMPILED = ["cpu", "cuda, emulated", *([GPU] if cuda.unavailable() is None else [])]


@pytest.fixture(params=_COMPILED)
def compiled(request: pytest.FixtureRequest) -> Implementation:
    """Every backend's kernels."""
    return _implementation(request.param, request)


@pytest.fixture(params=["in use", "reference", *_COMPILED])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """The kernels, the reference, and what users get."""
    return _implementation(request.param, request)
