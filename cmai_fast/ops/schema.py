"""The contract of every operator: its schema, what it refuses, and what it returns (the fake rule).

The checks read shapes, dtypes and devices only, never values, so that they serve tracing too and never wait for a GPU.
Every kernel runs behind them: see `backend.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("cmai_fast", "DEF")

_PGD_STEP = (
    "(Tensor(a!) adv, Tensor grad, Tensor clean, Tensor eps, Tensor step, Tensor? active=None, *, "
    "Tensor(b!)? model_input=None, Tensor? mean=None, Tensor? std=None, float lower=0.0, float upper=1.0) -> ()"
)

SCHEMAS = {
    "pgd_linf_step_": _PGD_STEP,
    "pgd_l2_step_": _PGD_STEP,
    "random_start_": (
        "(Tensor(a!) adv, Tensor clean, Tensor eps, Tensor sample_ids, int seed, str norm, "
        "float lower=0.0, float upper=1.0) -> ()"
    ),
    "cosine_heads": "(Tensor image, Tensor text) -> Tensor",
    "cosine_heads_backward": "(Tensor grad, Tensor image, Tensor text) -> (Tensor, Tensor)",
    "info_nce": "(Tensor query, Tensor keys, Tensor labels, Tensor scale) -> (Tensor loss, Tensor log_sum_exp)",
    "info_nce_backward": (
        "(Tensor grad, Tensor query, Tensor keys, Tensor labels, Tensor scale, Tensor log_sum_exp) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}

_STATE_DTYPES = (torch.float32, torch.float64)
_FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32: what half-precision inputs are accumulated and returned in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _check_float(name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in _FLOAT_DTYPES,
        lambda: f"{name} has dtype {tensor.dtype}, expected float32, float64, bfloat16 or float16; convert it",
    )


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    torch._check(
        tuple(tensor.shape) == tuple(expected),
        lambda: f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} {meaning}",
    )


def _check_device(name: str, tensor: Tensor, owner: str, expected: Tensor) -> None:
    torch._check(
        tensor.device == expected.device,
        lambda: f"{name} is on {tensor.device} but {owner} is on {expected.device}; move {name} there",
    )


def _check_state(adv: Tensor, clean: Tensor, eps: Tensor, lower: float, upper: float) -> None:
    """What all operators on adversarial images ask of the image, its clean original, the radius and the pixel box."""
    torch._check(
        adv.dtype in _STATE_DTYPES,
        lambda: (
            f"adv has dtype {adv.dtype}, expected float32 or float64: the state of an attack drifts out of its ball in "
            "half precision; keep adv in float32 and pass the half-precision copy as model_input"
        ),
    )
    torch._check(adv.dim() >= 2, lambda: f"adv has shape {tuple(adv.shape)}, expected (N, ...) with 2 or more dims")
    torch._check(adv is not clean, lambda: "adv and clean are the same tensor, so the ball has no centre; clone one")
    _check_shape("clean", clean, adv.shape, "like adv")
    torch._check(clean.dtype == adv.dtype, lambda: f"clean has dtype {clean.dtype}, expected {adv.dtype} like adv")
    _check_device("clean", clean, "adv", adv)
    _check_rows("eps", eps, adv)
    torch._check(lower <= upper, lambda: f"the pixel box is empty: lower={lower} is above upper={upper}")


def _check_rows(name: str, values: Tensor, adv: Tensor) -> None:
    _check_shape(name, values, (adv.shape[0],), "(one per row of adv)")
    _check_float(name, values)
    _check_device(name, values, "adv", adv)


def check_pgd_step(
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
    _check_state(adv, clean, eps, lower, upper)
    _check_rows("step", step, adv)
    for name, image in (("grad", grad), ("model_input", model_input)):
        if image is not None:
            _check_shape(name, image, adv.shape, "like adv")
            _check_float(name, image)
            _check_device(name, image, "adv", adv)
    torch._check(
        model_input is not adv,
        lambda: "model_input and adv are the same tensor, so the state would be lost; allocate model_input apart",
    )
    if active is not None:
        _check_shape("active", active, (adv.shape[0],), "(one per row of adv)")
        torch._check(active.dtype == torch.bool, lambda: f"active has dtype {active.dtype}, expected torch.bool")
        _check_device("active", active, "adv", adv)
    torch._check(
        (mean is None) == (std is None),
        lambda: f"got {'std' if mean is None else 'mean'} alone; pass mean and std together, or neither",
    )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            _check_shape(name, values, (adv.shape[1],), "(one per channel, dim 1 of adv)")
            _check_float(name, values)
            _check_device(name, values, "adv", adv)


def check_random_start(
    adv: Tensor,
    clean: Tensor,
    eps: Tensor,
    sample_ids: Tensor,
    seed: int,
    norm: str,
    lower: float = 0.0,
    upper: float = 1.0,
) -> None:
    _check_state(adv, clean, eps, lower, upper)
    _check_shape("sample_ids", sample_ids, (adv.shape[0],), "(one per row of adv)")
    torch._check(
        sample_ids.dtype == torch.int64, lambda: f"sample_ids has dtype {sample_ids.dtype}, expected torch.int64"
    )
    _check_device("sample_ids", sample_ids, "adv", adv)
    torch._check(norm in ("linf", "l2"), lambda: f"norm is {norm!r}, expected 'linf' or 'l2'")


def check_cosine_heads(image: Tensor, text: Tensor) -> None:
    torch._check(image.dim() == 3, lambda: f"image has shape {tuple(image.shape)}, expected (N, H, D)")
    _check_shape("text", text, image.shape, "like image")
    _check_float("image", image)
    _check_float("text", text)
    _check_device("text", text, "image", image)


def check_cosine_heads_backward(grad: Tensor, image: Tensor, text: Tensor) -> None:
    check_cosine_heads(image, text)
    _check_shape("grad", grad, image.shape[:2], "(one per sample and head)")


def check_info_nce(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> None:
    torch._check(query.dim() == 2, lambda: f"query has shape {tuple(query.shape)}, expected (N, D)")
    torch._check(
        keys.dim() == 2 and keys.shape[1] == query.shape[1],
        lambda: f"keys has shape {tuple(keys.shape)}, expected (M, {query.shape[1]}) to match query's D",
    )
    _check_shape("labels", labels, query.shape[:1], "(one per row of query)")
    torch._check(labels.dtype == torch.int64, lambda: f"labels has dtype {labels.dtype}, expected torch.int64")
    _check_shape("scale", scale, (), "(a 0-d tensor, 1 / temperature)")
    for name, tensor in (("query", query), ("keys", keys), ("scale", scale)):
        _check_float(name, tensor)
    for name, tensor in (("keys", keys), ("labels", labels), ("scale", scale)):
        _check_device(name, tensor, "query", query)


def check_info_nce_backward(
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, log_sum_exp: Tensor
) -> None:
    check_info_nce(query, keys, labels, scale)
    _check_shape("grad", grad, (), "(the gradient of the 0-d loss)")
    _check_shape("log_sum_exp", log_sum_exp, query.shape[:1], "(one per row of query, from info_nce)")


CHECKS: dict[str, Callable[..., None]] = {
    "pgd_linf_step_": check_pgd_step,
    "pgd_l2_step_": check_pgd_step,
    "random_start_": check_random_start,
    "cosine_heads": check_cosine_heads,
    "cosine_heads_backward": check_cosine_heads_backward,
    "info_nce": check_info_nce,
    "info_nce_backward": check_info_nce_backward,
}


def _fake_cosine_heads(image: Tensor, text: Tensor) -> Tensor:
    return image.new_empty(image.shape[:2], dtype=compute_dtype(image, text))


def _fake_cosine_heads_backward(grad: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape), text.new_empty(text.shape)


def _fake_info_nce(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query, keys, scale)
    return query.new_empty((), dtype=dtype), query.new_empty(query.shape[:1], dtype=dtype)


def _fake_info_nce_backward(
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), scale.new_empty(())


# Operators that are not named here write into their arguments and return nothing.
_FAKE_RESULTS: dict[str, Callable[..., Any]] = {
    "cosine_heads": _fake_cosine_heads,
    "cosine_heads_backward": _fake_cosine_heads_backward,
    "info_nce": _fake_info_nce,
    "info_nce_backward": _fake_info_nce_backward,
}


def _define(name: str) -> None:
    LIBRARY.define(name + SCHEMAS[name])

    def fake(*args: Any, **kwargs: Any) -> Any:
        CHECKS[name](*args, **kwargs)
        return _FAKE_RESULTS[name](*args, **kwargs) if name in _FAKE_RESULTS else None

    torch.library.register_fake(f"cmai_fast::{name}", fake, lib=LIBRARY)


for _name in SCHEMAS:
    _define(_name)
