"""Chooses the kernels: the backend of the environment variable `CMAI_FAST_BACKEND`, or the fastest available one.

A backend is a module with `unavailable()`, which returns the reason why it cannot run or None, and `KERNELS`, a planner
per supported operator. A planner takes the arguments of a call (those of a step as a type of `signatures.py`) and
returns the kernel for all calls of that signature, which takes the arguments in order, or None if it does not support
them; then the reference runs. Checks, choice of the kernel and layout depend only on the signature, and are done once
per signature.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cmai_fast.ops import cpu, cuda, reference, triton_kernels
from cmai_fast.ops.schema import CHECKS, LIBRARY, SCHEMAS
from cmai_fast.ops.signatures import STEPS

_READY = "ready"
_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton_kernels}
# By the device of a call's tensors: the first backend that is ready and supports the call is used.
_SERVES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Bound here, since every call of an operator asks them.
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_batched = torch._C._functorch.is_legacy_batchedtensor  # by `is_grads_batched`, without a transform
# A model has few shapes, and an attack's batch shrinks; more signatures than this would be a leak.
_MOST_PLANS = 4096


def backend_report() -> dict[str, str]:
    """Each backend with "ready", or the reason why it is unavailable."""
    return {"reference": _READY} | {name: module.unavailable() or _READY for name, module in _BACKENDS.items()}


@functools.cache
def chosen_backend() -> str:
    """The backend of `CMAI_FAST_BACKEND`, read at the first operator call, or "automatic".

    Raises:
        RuntimeError: the variable names a backend that does not exist or cannot run.
    """
    wanted = os.environ.get("CMAI_FAST_BACKEND")
    if not wanted:
        return "automatic"
    report = backend_report()
    if wanted not in report:
        raise RuntimeError(f"CMAI_FAST_BACKEND={wanted!r} is not a backend; choose one of {', '.join(report)}")
    if report[wanted] != _READY:
        ready = ", ".join(name for name, state in report.items() if state == _READY)
        raise RuntimeError(
            f"CMAI_FAST_BACKEND={wanted} is unavailable: {report[wanted]}. Unset it, or choose one of: {ready}"
        )
    return wanted


@functools.cache
def backends_for(device: str) -> tuple[str, ...]:
    """The backends to try, in order, for tensors on a device of this type, before the reference.

    Raises:
        RuntimeError: `CMAI_FAST_BACKEND` names one that does not serve this device.
    """
    wanted, served = chosen_backend(), list(_SERVES.get(device, ()))
    if wanted == "triton" and triton_kernels.interpreted():
        served.append("triton")
    if wanted == "reference":
        return ()
    if wanted != "automatic":
        if wanted not in served:
            raise RuntimeError(
                f"CMAI_FAST_BACKEND={wanted} is unavailable for tensors on {device}; unset it, or move the tensors"
            )
        return (wanted,)
    # Only those: querying the CUDA backend starts the driver, and then a process that only used the CPU could not be
    # forked into one that uses a GPU.
    report = {name: _BACKENDS[name].unavailable() or _READY for name in served}
    ready = tuple(name for name in served if report[name] == _READY)
    if served and not ready:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.items())
        warnings.warn(f"cmai_fast runs its slower reference operators on {device} ({reasons})", RuntimeWarning, 3)
    return ready


def _from_reference(name: str) -> Callable[..., Any]:
    operator = getattr(reference, name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        # `autograd.py` has the gradients; in-place writes to leaves that require grad are intended, as in optimisers.
        with torch.no_grad():
            return operator(*args, **kwargs)

    return kernel


def _plan(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    if any(isinstance(value, Tensor) and _deferred(value) for value in (*args, *kwargs.values())):
        return _from_reference(name)
    for backend in backends_for(args[0].device.type):
        planner = _BACKENDS[backend].KERNELS.get(name)
        whole = (STEPS[name](*args),) if name in STEPS else args
        kernel = planner(*whole, **kwargs) if planner else None
        if kernel is not None:
            return kernel
    return _from_reference(name)


def _deferred(tensor: Tensor) -> bool:
    """PyTorch negates some tensors, and makes zeros, only when they are read through its dispatcher."""
    return tensor.is_neg() or tensor._is_zerotensor()


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any], mutates: bool) -> tuple[Any, ...] | None:
    """Everything that a check or plan may depend on. None if that is not enough: if two arguments of an operator that
    mutates share memory, which a check may refuse, or a tensor differs from the content of its memory."""
    key, seen, tensors = [], set(), 0
    for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if _deferred(value):
                return None
            if mutates:
                tensors += 1
                seen.add(value.data_ptr())
            key.append((value.shape, value.dtype, value.device, value.is_contiguous()))
        else:
            key.append(value)
    return tuple(key) if len(seen) == tensors else None


def _kernel_of(name: str) -> Callable[..., Any]:
    check, mutates, arguments = CHECKS[name], name.endswith("_"), STEPS.get(name)
    count = 0 if arguments is None else len(arguments._fields)
    plans: dict[Any, Callable[..., Any]] = {}
    _PLANS.append(plans)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if mutates and args[0].grad_fn is not None:
            raise RuntimeError(
                f"adv has a grad_fn ({args[0].grad_fn.name()}), and an in-place step has no gradient, so "
                "earlier operations would get a wrong one; pass adv.detach()"
            )
        if arguments is not None and len(args) < count:  # PyTorch omits default values
            args, kwargs = arguments(*args, **kwargs), {}
        signature = _signature(args, kwargs, mutates)
        plan = plans.get(signature)
        if plan is None:
            check(*args, **kwargs)
            plan = _plan(name, args, kwargs)
            if signature is not None:
                if len(plans) >= _MOST_PLANS:
                    plans.clear()
                plans[signature] = plan
        if arguments is None and torch.is_autocast_enabled(args[0].device.type):
            # Matrix products inside would be half as precise as promised, and of another dtype than their sums.
            with torch.autocast(args[0].device.type, enabled=False):
                return plan(*args, **kwargs)
        return plan(*args, **kwargs)

    return kernel


def is_plain(tensor: Tensor) -> bool:
    """Whether nothing but PyTorch's own kernels would see an operation on it: no compiler, mode or transform."""
    if type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    return _modes() == 0 and _transforms() is None and not _batched(tensor)


def call(name: str) -> Callable[..., Any]:
    """The operator `name`, without a gradient. Bypasses PyTorch's dispatcher unless a mode or transform is active.

    The dispatcher would take 3 of 9 microseconds per step on a small image (AMD EPYC).
    """
    kernel, operator = _KERNELS[name], getattr(torch.ops.cmai_fast, name)

    def run(first: Tensor, *args: Any) -> Any:
        if is_plain(first):
            try:
                return kernel(first, *args)
            except (AttributeError, TypeError):
                pass  # an argument of the wrong type: the schema's error names it
        return operator(first, *args)

    return run


def forget_choices() -> None:
    """Reads `CMAI_FAST_BACKEND` again at the next call."""
    chosen_backend.cache_clear()
    backends_for.cache_clear()
    for plans in _PLANS:
        plans.clear()


_PLANS: list[dict[Any, Callable[..., Any]]] = []
_KERNELS = {name: _kernel_of(name) for name in SCHEMAS}
for _name, _kernel in _KERNELS.items():
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
