"""Triton kernels compiled ahead of time for GPUs that need not be here, and what the binary says of them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cmai_fast.ops import triton_kernels

CAPABILITIES = (80, 90, 100)


class _Device:
    """As much of a GPU as choosing and compiling a kernel looks at."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # the key of Triton's caches in memory: no number of a device that is here

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclass
class Binary:
    """A compiled kernel. The instructions are those of the machine (SASS), e.g. "LDG.E.128"."""

    name: str
    ttir: str = field(repr=False)
    ttgir: str = field(repr=False)
    sass: str = field(repr=False)
    registers: int  # per thread
    spilled: int  # bytes of local memory per thread, stack included
    shared: int  # bytes per block

    def count(self, instruction: str) -> int:
        """How often an instruction occurs, with whatever modifiers follow: "LDG.E" counts "LDG.E.128.CONSTANT"."""
        return len(re.findall(rf"\s{re.escape(instruction)}(?![A-Z0-9])", self.sass))


@contextlib.contextmanager
def _as_if_on(capability: int) -> Iterator[list[Any]]:
    """Launches compile for this capability, run nothing, and leave (name, compiled kernel) in the list."""
    compiled: list[Any] = []
    launch, driver = JITFunction.run, triton.runtime.driver
    active = driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(triton_kernels, "runs_on", lambda tensor: True)  # planners must look it up in its module
        driver.set_active(_Device(capability))
        try:
            yield compiled
        finally:
            driver._active = active


def compile_launches(capability: int, run: Callable[[], Any]) -> list[Binary]:
    """The kernels that `run` launches, in order, as Triton would compile them for these very arguments: with their
    dtypes, and with the alignment of pointers and sizes that it would find."""
    assert not triton_kernels.interpreted(), "compiling needs a process without TRITON_INTERPRET"
    with _as_if_on(capability) as compiled:
        run()
    return [_inspect(name, kernel) for name, kernel in compiled]


_inspected: dict[bytes, Binary] = {}


def _inspect(name: str, kernel: Any) -> Binary:
    if kernel.asm["cubin"] not in _inspected:
        _inspected[kernel.asm["cubin"]] = _disassemble(name, kernel)
    return _inspected[kernel.asm["cubin"]]


def _disassemble(name: str, kernel: Any) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path]
        text = subprocess.run(
            [*tool, "--dump-sass", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Binary(
        name=name,
        ttir=kernel.asm["ttir"],
        ttgir=kernel.asm["ttgir"],
        sass=text,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
    )


def check_spills(binary: Binary) -> None:
    assert binary.spilled == 0 and binary.count("LDL") == 0 and binary.count("STL") == 0, f"{binary} spills"


def check_offsets(binary: Binary) -> None:
    """A batch may have 2^31 elements and more: nothing is multiplied in 32 bits, and images are reached by 64."""
    lines = binary.ttir.splitlines()
    small = r"arith\.muli .* : (tensor<\d+x)?i32|tt\.addptr .*, tensor<\d+xi32>"
    narrow = [line for line in lines if re.search(small, line)]
    assert not narrow, f"{binary.name}: {narrow}"
    assert any(re.search(r"tt\.addptr .*, tensor<\d+xi64>", line) for line in lines)
