"""The CPU backend: the kernels of the compiled extension `cmai_fast._C`, over raw pointers.

It supports the steps of PGD and APGD and the random start, for contiguous tensors with `adv` in float32, `clean` in
float32 or uint8, and `grad` and `model_input` in float32, bfloat16 or float16. Everything else (float64, strided or
channels-last tensors) runs the reference: a copy into a contiguous buffer would cost what the kernel saves, and would
be wrong for mutated arguments. It supports the gated activation in float32, bfloat16 and float16.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmai_fast.ops.schema import RATES
from cmai_fast.ops.signatures import ApgdStep, PgdStep, RandomStart


def _load() -> Any:
    """Loads the extension, which uses the OpenMP runtime of PyTorch (see setup.py)."""
    try:
        return importlib.import_module("cmai_fast._C")
    except ImportError as error:
        if "undefined symbol: GOMP_" not in str(error) and "undefined symbol: omp_" not in str(error):
            raise
        # This PyTorch has no OpenMP runtime, or hides it.
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        return importlib.import_module("cmai_fast._C")


def _why_missing(error: Exception) -> str:
    """The reason recorded by the build (see setup.py), else that of the failed import."""
    note = Path(__file__).parent.parent / "_C.txt"
    if note.exists():
        return f"the compiled extension cmai_fast._C was not built: {note.read_text().strip()}"
    return f"the compiled extension cmai_fast._C does not load ({error}); reinstall with a C++ compiler present"


_C: Any = None
_missing: str | None = None
try:
    _C = _load()
except (ImportError, OSError) as error:
    _missing = _why_missing(error)

# The numbers are those of cmai_fast::Type in csrc/step.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


# (kernel's name, layout, device, whether it sums over rows) -> the kernel, called with the other arguments of a step;
# or None if it does not support the layout or the device.
Launcher = Callable[[str, Any, torch.device, bool], Callable[..., None] | None]


def unavailable() -> str | None:
    """Why this backend cannot run, or None."""
    return _missing


def build_report() -> dict[str, str]:
    """How the compiled extension was built: compiler, flags, OpenMP, CUDA and its architectures; empty without one."""
    return {} if _C is None else dict(_C.BUILD)


def _launcher(name: str, layout: Any, device: torch.device, sums: bool) -> Callable[..., None]:
    native, threads = getattr(_C, name), torch.get_num_threads
    return lambda *arguments: native(layout, *arguments, threads())


def layout_of(
    c: PgdStep | ApgdStep | RandomStart,
    grad: Tensor | None = None,
    model_input: Tensor | None = None,
    *others: Tensor | None,
) -> Any:
    """The extension's `Layout` of a call, or None if the kernels do not support it. `others` are in adv's dtype."""
    adv, clean = c.adv, c.clean
    grad, model_input = adv if grad is None else grad, adv if model_input is None else model_input
    images = [adv, clean, grad, model_input, *(image for image in others if image is not None)]
    if (
        adv.numel() == 0
        or adv.dtype != torch.float32
        or not {grad.dtype, model_input.dtype, clean.dtype} <= TYPES.keys()
        or not all(image.is_contiguous() for image in images)
    ):
        return None
    mean = None if isinstance(c, RandomStart) else c.mean
    channels, patches = (1, 1) if mean is None else (mean.shape[0], c.patches)  # type: ignore[union-attr]
    return _C.Layout(
        rows=adv.shape[0],
        patches=patches,
        channels=channels,
        inner=math.prod(adv.shape[1:]) // (channels * patches),
        grad=TYPES[grad.dtype],
        clean=TYPES[clean.dtype],
        model_input=TYPES[model_input.dtype],
        lower=c.lower,
        upper=c.upper,
    )


def small(values: Tensor | None) -> Tensor | None:
    """Read-only values per row or channel as contiguous float32; a copy is allowed here."""
    return None if values is None else values.to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _plan_pgd(name: str, launcher: Launcher, device: str) -> Callable[..., Callable[..., None] | None]:
    """The planner of the kernel `name` for tensors on `device`."""

    def planner(c: PgdStep) -> Callable[..., None] | None:
        if c.adv.device.type != device:
            return None
        if any(values is not None and not values.is_contiguous() for values in (c.active, c.nonfinite)):
            return None
        layout = layout_of(c, c.grad, c.model_input, c.velocity)
        if layout is None:
            return None
        run = launcher(name, layout, c.adv.device, c.velocity is not None or "l2" in name)
        if run is None:
            return None
        wrote = torch.autograd.graph.increment_version
        ready = all(
            values is None or (values.dtype == torch.float32 and values.is_contiguous())
            for values in (c.eps, c.step, c.mean, c.std)
        )

        def kernel(
            adv, grad, clean, eps, step, active, model_input, velocity, decay, nonfinite, mean, std, *_: Any
        ) -> None:
            if not ready:  # these names keep the copies alive while the kernel runs
                eps, step, mean, std = eps.float().contiguous(), step.float().contiguous(), small(mean), small(std)
            run(
                adv.data_ptr(), grad.data_ptr(), clean.data_ptr(), eps.data_ptr(), step.data_ptr(), _pointer(active),
                _pointer(model_input), _pointer(velocity), _pointer(nonfinite), _pointer(mean), _pointer(std), decay,
            )  # fmt: skip
            # PyTorch does not see the writes; without this a backward pass through old values would be silently wrong.
            wrote([image for image in (adv, model_input, velocity, nonfinite) if image is not None])

        return kernel

    return planner


def _plan_apgd(name: str, launcher: Launcher, device: str) -> Callable[..., Callable[..., None] | None]:
    """The planner of the kernel `name` for tensors on `device`."""

    def planner(c: ApgdStep) -> Callable[..., None] | None:
        if c.adv.device.type != device or (c.nonfinite is not None and not c.nonfinite.is_contiguous()):
            return None
        layout = layout_of(c, c.grad, c.model_input, c.previous, c.top_adv, c.top_grad)
        if layout is None:
            return None
        run = launcher(name, layout, c.adv.device, "l2" in name)
        if run is None:
            return None

        def kernel(
            adv,
            previous,
            grad,
            top_adv,
            top_grad,
            clean,
            eps,
            step,
            improved,
            restart,
            momentum,
            model_input,
            nonfinite,
            mean,
            std,
            *_: Any,
        ) -> None:
            eps, step, mean, std = eps.float().contiguous(), step.float().contiguous(), small(mean), small(std)
            improved, restart = improved.contiguous(), restart.contiguous()
            run(
                adv.data_ptr(), previous.data_ptr(), grad.data_ptr(), top_adv.data_ptr(), top_grad.data_ptr(),
                clean.data_ptr(), eps.data_ptr(), step.data_ptr(), improved.data_ptr(), restart.data_ptr(),
                _pointer(model_input), _pointer(nonfinite), _pointer(mean), _pointer(std), momentum,
            )  # fmt: skip
            written = (adv, previous, top_adv, top_grad, model_input, nonfinite)
            torch.autograd.graph.increment_version([image for image in written if image is not None])

        return kernel

    return planner


def _plan_random_start(name: str, launcher: Launcher, device: str) -> Callable[..., Callable[..., None] | None]:
    """The planner of the kernels `name`_linf and `name`_l2 for tensors on `device`."""

    def planner(c: RandomStart) -> Callable[..., None] | None:
        layout = layout_of(c) if c.adv.device.type == device else None
        if layout is None:
            return None
        run = launcher(f"{name}_{c.norm}", layout, c.adv.device, c.norm == "l2")
        if run is None:
            return None

        def kernel(adv, clean, eps, sample_ids, seed, *_: Any) -> None:
            eps, sample_ids = eps.float().contiguous(), sample_ids.contiguous()
            run(adv.data_ptr(), clean.data_ptr(), eps.data_ptr(), sample_ids.data_ptr(), seed)
            torch.autograd.graph.increment_version([adv])

        return kernel

    return planner


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def like(tensor: Tensor) -> Tensor:
    """Contiguous, without values."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _activation_kernel(name: str, launcher: Launcher, device: str, x: Tensor) -> Callable[..., None] | None:
    """The extension's kernel for tensors like x, or None if it does not support them."""
    if x.device.type != device or x.dtype not in TYPES or x.numel() == 0:
        return None
    kind = TYPES[x.dtype]
    layout = _C.Layout(
        rows=1, patches=1, channels=1, inner=x.numel(), grad=kind, clean=kind, model_input=kind, lower=0, upper=0
    )
    return launcher(name, layout, x.device, False)


def _plan_gated_activation(name: str, launcher: Launcher, device: str) -> Callable[..., Callable[..., Any] | None]:
    """The planner of the kernel `name` for tensors on `device`."""

    def planner(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Callable[..., Tensor] | None:
        run, rate = _activation_kernel(name, launcher, device, x), RATES[kind]
        if run is None:
            return None

        def kernel(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Tensor:
            x, other, out = x.contiguous(), contiguous(other), like(x)
            run(rate, x.data_ptr(), _pointer(other), out.data_ptr())
            return out

        return kernel

    return planner


def _plan_gated_activation_backward(
    name: str, launcher: Launcher, device: str
) -> Callable[..., Callable[..., Any] | None]:
    """The planner of the kernel `name` for tensors on `device`."""

    def planner(
        grad: Tensor, x: Tensor, other: Tensor | None, kind: str
    ) -> Callable[..., tuple[Tensor, Tensor]] | None:
        run, rate = _activation_kernel(name, launcher, device, x), RATES[kind]
        if run is None:
            return None

        def kernel(grad: Tensor, x: Tensor, other: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
            grad, x, other = grad.contiguous(), x.contiguous(), contiguous(other)
            grad_x, grad_other = like(x), x.new_empty(0) if other is None else like(x)
            run(rate, x.data_ptr(), _pointer(other), grad.data_ptr(), grad_x.data_ptr(), grad_other.data_ptr())
            return grad_x, grad_other

        return kernel

    return planner


def planners(launcher: Launcher, device: str, prefix: str = "") -> dict[str, Callable[..., Callable[..., Any] | None]]:
    """The planner of each operator's kernel, whose name in the extension starts with `prefix`."""
    return {
        "pgd_linf_step_": _plan_pgd(prefix + "pgd_linf_step", launcher, device),
        "pgd_l2_step_": _plan_pgd(prefix + "pgd_l2_step", launcher, device),
        "apgd_linf_step_": _plan_apgd(prefix + "apgd_linf_step", launcher, device),
        "apgd_l2_step_": _plan_apgd(prefix + "apgd_l2_step", launcher, device),
        "random_start_": _plan_random_start(prefix + "random_start", launcher, device),
        "gated_activation": _plan_gated_activation(prefix + "gated_activation", launcher, device),
        "gated_activation_backward": _plan_gated_activation_backward(
            prefix + "gated_activation_backward", launcher, device
        ),
    }


KERNELS = planners(_launcher, "cpu")
