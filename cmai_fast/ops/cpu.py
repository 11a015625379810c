"""The CPU backend: the kernels of the compiled extension `cmai_fast._C`, over raw pointers.

It carries the two PGD steps for contiguous CPU tensors with `adv` and `clean` in float32 and `grad` and `model_input`
in float32 or bfloat16. Everything else (float64, float16, strided or channels-last tensors, other devices) runs the
reference: a copy into a contiguous buffer would cost what the kernel saves, and for what is mutated it would be wrong.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from cmai_fast.ops import reference

_C: Any = None
_missing: str | None = None
try:
    _C = importlib.import_module("cmai_fast._C")
except ImportError as error:
    _missing = f"the compiled extension cmai_fast._C does not load ({error}); reinstall with a C++ compiler present"

_MODEL_DTYPES = (torch.float32, torch.bfloat16)


def unavailable() -> str | None:
    """Why this backend cannot run, or None."""
    return _missing


def _carries(adv: Tensor, grad: Tensor, clean: Tensor, model_input: Tensor | None) -> bool:
    for_model = [grad] if model_input is None else [grad, model_input]
    return (
        adv.dtype == torch.float32
        and all(tensor.dtype in _MODEL_DTYPES for tensor in for_model)
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in (adv, clean, *for_model))
    )


def _run(
    kernel: str,
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    active: Tensor | None,
    model_input: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    lower: float,
    upper: float,
) -> None:
    # The small ones are only read, so a copy is right; the names keep the copies alive while the kernel reads them.
    eps, step = eps.to(torch.float32).contiguous(), step.to(torch.float32).contiguous()
    active = None if active is None else active.contiguous()
    mean = None if mean is None else mean.to(torch.float32).contiguous()
    std = None if std is None else std.to(torch.float32).contiguous()
    channels = 1 if mean is None else adv.shape[1]
    getattr(_C, kernel)(
        adv=adv.data_ptr(),
        grad=grad.data_ptr(),
        grad_is_bf16=grad.dtype == torch.bfloat16,
        clean=clean.data_ptr(),
        eps=eps.data_ptr(),
        step=step.data_ptr(),
        active=0 if active is None else active.data_ptr(),
        model_input=0 if model_input is None else model_input.data_ptr(),
        model_input_is_bf16=model_input is not None and model_input.dtype == torch.bfloat16,
        mean=0 if mean is None else mean.data_ptr(),
        std=0 if std is None else std.data_ptr(),
        rows=adv.shape[0],
        channels=channels,
        inner=adv.numel() // (adv.shape[0] * channels),
        lower=lower,
        upper=upper,
        threads=torch.get_num_threads(),
    )
    # PyTorch has not seen the write; without this a backward through the old values would be silently wrong.
    torch.autograd.graph.increment_version([adv] if model_input is None else [adv, model_input])


def pgd_linf_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    active: Tensor | None = None,
    *,
    model_input: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    if adv.numel() > 0 and _carries(adv, grad, clean, model_input):
        _run("pgd_linf_step", adv, grad, clean, eps, step, active, model_input, mean, std, lower, upper)
    else:
        reference.pgd_linf_step_(
            adv, grad, clean, eps, step, active, model_input=model_input, mean=mean, std=std, lower=lower, upper=upper
        )


def pgd_l2_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    eps: Tensor,
    step: Tensor,
    active: Tensor | None = None,
    *,
    model_input: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    if adv.numel() > 0 and _carries(adv, grad, clean, model_input):
        _run("pgd_l2_step", adv, grad, clean, eps, step, active, model_input, mean, std, lower, upper)
    else:
        reference.pgd_l2_step_(
            adv, grad, clean, eps, step, active, model_input=model_input, mean=mean, std=std, lower=lower, upper=upper
        )
