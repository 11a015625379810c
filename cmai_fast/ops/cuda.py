"""The CUDA backend: the CUDA kernels of the compiled extension `cmai_fast._C`, on the current stream of PyTorch.

It supports the same calls as the CPU backend (see `cpu.py`, with the planners of both). A launch allocates its scratch
memory with PyTorch's allocator and does not synchronise, so CUDA graphs can capture it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from cmai_fast.ops.cpu import _C, Launcher, planners
from cmai_fast.ops.cpu import unavailable as _extension_missing


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run, or None."""
    if missing := _extension_missing():
        return missing
    if not hasattr(_C, "cuda_no_device"):
        return f"built without CUDA: {_C.BUILD['cuda'].removeprefix('none: ')}; rebuild with CMAI_FAST_CUDA=1"
    if reason := _C.cuda_no_device():
        return f"no CUDA device or driver: {reason}"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} cannot use CUDA; install its CUDA build"
    if not any(_runs_on(index) for index in range(torch.cuda.device_count())):
        return f"built only for the architectures {_C.BUILD['cuda architectures']}, which no available device has"
    return None


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures` ("80;90", the last as PTX too) runs on a device of this capability.

    Machine code runs on the same major version with an equal or higher minor version; that of names like 90a only on
    exactly that capability; PTX on everything newer.
    """
    names = architectures.split(";")
    for name in names:
        digits = name.rstrip("af")
        built = int(digits[:-1]), int(digits[-1])
        later = digits == name and built <= capability and (built[0] == capability[0] or name == names[-1])
        if built == capability or later:
            return True
    return False


@functools.cache
def _runs_on(index: int) -> bool:
    return covers(_C.BUILD["cuda architectures"], torch.cuda.get_device_capability(index))


def make_launcher(extension: Any, runs_on: Callable[[int], bool], stream_of: Callable[[torch.device], int]) -> Launcher:
    """The launcher of the kernels `cuda_*` of an extension."""

    def launcher(name: str, layout: Any, device: torch.device, sums: bool) -> Callable[..., None] | None:
        index = device.index or 0
        if not runs_on(index) or not extension.cuda_carries(layout):
            return None
        native, size = getattr(extension, name), extension.cuda_scratch_size(layout) if sums else 0

        def run(*arguments: Any) -> None:
            # This name keeps the memory reserved until the launch; afterwards the stream's order does.
            scratch = torch.empty(size, dtype=torch.float64, device=device) if sums else None
            native(layout, *arguments, 0 if scratch is None else scratch.data_ptr(), index, stream_of(device))

        return run

    return launcher


def _stream(device: torch.device) -> int:
    # As `torch.cuda.current_stream(device).cuda_stream`, without an object for each call.
    return torch._C._cuda_getCurrentRawStream(device.index or 0)


KERNELS = planners(make_launcher(_C, _runs_on, _stream), "cuda", "cuda_")
