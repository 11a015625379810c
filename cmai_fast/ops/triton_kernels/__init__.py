"""The Triton backend: kernels for NVIDIA GPUs that need no compiler beyond the one that comes with PyTorch.

Each module is one idea, from its formula down to `KERNELS`, its planners. They are imported at the first call that a
planner is asked about, since importing triton takes longer than many a program that never sees a GPU. What the kernels
do not carry (float64, strided tensors, tensors that are not on a CUDA device) runs the reference.

With TRITON_INTERPRET=1 in the environment of the process the kernels run on the CPU, slowly: for tests and debugging.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Operator: the module that carries it.
_MODULES = {
    "pgd_linf_step_": "pgd_step",
    "pgd_l2_step_": "pgd_step",
    "apgd_linf_step_": "apgd_step",
    "apgd_l2_step_": "apgd_step",
    "random_start_": "random_start",
    "cosine_heads": "cosine_heads",
    "cosine_heads_backward": "cosine_heads",
    "info_nce": "info_nce",
    "info_nce_backward": "info_nce",
    "gated_activation": "gated_activation",
    "gated_activation_backward": "gated_activation",
}


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for the GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> str | None:
    """Why this backend cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'cmai-fast[triton]'"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device or driver"
    return None


def runs_on(tensor: Tensor) -> bool:
    """Whether the kernels can be launched on this tensor's device."""
    return tensor.is_cuda or (interpreted() and tensor.device.type == "cpu")


def _late(operator: str, module: str) -> Callable[..., Callable[..., Any] | None]:
    def planner(*args: Any, **kwargs: Any) -> Callable[..., Any] | None:
        return importlib.import_module(f"{__name__}.{module}").KERNELS[operator](*args, **kwargs)

    return planner


KERNELS = {operator: _late(operator, module) for operator, module in _MODULES.items()}
