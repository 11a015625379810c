"""The contract of every operator: its schema, its checks, and its result (the fake rule).

The checks read shapes, dtypes and devices only, never values, so they also work in tracing and never wait for a GPU.
They run before every kernel: see `backend.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmai_fast.ops.signatures import STEPS, ApgdStep, PgdStep, RandomStart, schema_of

LIBRARY = torch.library.Library("cmai_fast", "DEF")

SCHEMAS = {
    **{name: schema_of(arguments) for name, arguments in STEPS.items()},
    "cosine_heads": "(Tensor image, Tensor text) -> Tensor",
    "cosine_heads_backward": "(Tensor grad, Tensor image, Tensor text) -> (Tensor, Tensor)",
    "info_nce": (
        "(Tensor query, Tensor keys, Tensor labels, Tensor scale, bool symmetric=False) "
        "-> (Tensor loss, Tensor row_lse, Tensor column_lse)"
    ),
    "info_nce_backward": (
        "(Tensor grad, Tensor query, Tensor keys, Tensor labels, Tensor scale, Tensor row_lse, Tensor column_lse) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "sigmoid_loss": "(Tensor query, Tensor keys, Tensor labels, Tensor scale, Tensor bias) -> Tensor",
    "sigmoid_loss_backward": (
        "(Tensor grad, Tensor query, Tensor keys, Tensor labels, Tensor scale, Tensor bias) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "gated_activation": '(Tensor x, Tensor? other=None, str kind="silu") -> Tensor',
    # Without other its gradient has shape (0,).
    "gated_activation_backward": "(Tensor grad, Tensor x, Tensor? other, str kind) -> (Tensor, Tensor)",
}

# The rate r of each activation x * sigmoid(r * x).
RATES = {"silu": 1.0, "quick_gelu": 1.702}

_STATE_DTYPES = (torch.float32, torch.float64)
_FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if an input is float64, else float32, in which half-precision inputs are accumulated and returned."""
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


def _check_like(
    name: str, tensor: Tensor, adv: Tensor, dtypes: tuple[torch.dtype, ...], kind: str = "like adv"
) -> None:
    _check_shape(name, tensor, adv.shape, "like adv")
    torch._check(
        tensor.dtype in dtypes,
        lambda: f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))} ({kind})",
    )
    _check_device(name, tensor, "adv", adv)


def _check_state(adv: Tensor, clean: Tensor, eps: Tensor, lower: float, upper: float) -> None:
    """The checks of all operators on adversarial images: image, clean image, radius and pixel box."""
    torch._check(
        adv.dtype in _STATE_DTYPES,
        lambda: (
            f"adv has dtype {adv.dtype}, expected float32 or float64: the state of an attack drifts out of its ball in "
            "half precision; keep adv in float32 and pass the half-precision copy as model_input"
        ),
    )
    torch._check(adv.dim() >= 2, lambda: f"adv has shape {tuple(adv.shape)}, expected (N, ...) with 2 or more dims")
    _check_like("clean", clean, adv, (adv.dtype, torch.uint8), "that of adv, or 8-bit pixels")
    _check_rows("eps", eps, adv)
    torch._check(lower <= upper, lambda: f"the pixel box is empty: lower={lower} is above upper={upper}")


def _check_apart(tensors: dict[str, Tensor | None]) -> None:
    """Refuses a tensor used in two roles, or two tensors with the same address, if one is written."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            # Only plain tensors with elements have an address.
            plain = type(tensor) is Tensor and tensor.device.type != "meta" and tensor.numel() > 0
            other = seen.setdefault(tensor.data_ptr() if plain else id(tensor), name)
            torch._check(
                other == name,
                lambda name=name, other=other: (
                    f"{other} and {name} are the same tensor or share memory; {name} needs its own memory"
                ),
            )


def _check_rows(name: str, values: Tensor, adv: Tensor) -> None:
    _check_shape(name, values, (adv.shape[0],), "(one per row of adv)")
    _check_float(name, values)
    _check_device(name, values, "adv", adv)


def _check_flags(name: str, values: Tensor, adv: Tensor) -> None:
    _check_shape(name, values, (adv.shape[0],), "(one per row of adv)")
    torch._check(values.dtype == torch.bool, lambda: f"{name} has dtype {values.dtype}, expected torch.bool")
    _check_device(name, values, "adv", adv)


def _check_pixels(c: PgdStep | ApgdStep) -> None:
    """The checks of mean, std, model_input, and the count of non-finite gradient elements."""
    adv, model_input, nonfinite, mean, std, patches = c.adv, c.model_input, c.nonfinite, c.mean, c.std, c.patches
    if model_input is not None:
        _check_like("model_input", model_input, adv, _FLOAT_DTYPES)
    if nonfinite is not None:
        _check_shape("nonfinite", nonfinite, (adv.shape[0],), "(one count per row of adv)")
        torch._check(
            nonfinite.dtype == torch.int64, lambda: f"nonfinite has dtype {nonfinite.dtype}, expected torch.int64"
        )
        _check_device("nonfinite", nonfinite, "adv", adv)
    torch._check(
        (mean is None) == (std is None),
        lambda: f"got {'std' if mean is None else 'mean'} alone; pass mean and std together, or neither",
    )
    torch._check(patches >= 1, lambda: f"patches is {patches}, expected at least 1")
    if mean is None or std is None:
        return
    for name, values in (("mean", mean), ("std", std)):
        torch._check(
            values.dim() == 1 and values.shape[0] >= 1,
            lambda name=name, values=values: f"{name} has shape {tuple(values.shape)}, expected (C,), one per channel",
        )
        _check_float(name, values)
        _check_device(name, values, "adv", adv)
    _check_shape("std", std, mean.shape, "like mean")
    channels, row = mean.shape[0], math.prod(adv.shape[1:])
    if patches == 1:
        dim = 2 if adv.dim() == 5 and adv.shape[1] == 1 else 1  # one run of (N, runs, C, h, w)
        torch._check(
            adv.shape[dim] == channels,
            lambda: (
                f"mean has shape ({channels},), expected ({adv.shape[dim]},): one per channel, dim {dim} of adv. "
                "Flattened patches and channels-last images pass patches, the number of runs of channels in a row"
            ),
        )
    torch._check(
        row % (patches * channels) == 0,
        lambda: (
            f"a row of adv has {row} elements, expected a multiple of patches * channels = {patches} * {channels}; "
            "patches is the number of runs of all channels in a row"
        ),
    )


def check_pgd_step(*args: Any, **kwargs: Any) -> None:
    c = PgdStep(*args, **kwargs)
    _check_state(c.adv, c.clean, c.eps, c.lower, c.upper)
    _check_rows("step", c.step, c.adv)
    _check_like("grad", c.grad, c.adv, _FLOAT_DTYPES)
    if c.active is not None:
        _check_flags("active", c.active, c.adv)
    if c.velocity is not None:
        _check_like("velocity", c.velocity, c.adv, (c.adv.dtype,))
    torch._check(0 <= c.decay < math.inf, lambda: f"decay is {c.decay}, expected a finite number of at least 0")
    _check_pixels(c)
    _check_apart({"adv": c.adv, "grad": c.grad, "clean": c.clean, "model_input": c.model_input, "velocity": c.velocity})


def check_apgd_step(*args: Any, **kwargs: Any) -> None:
    c = ApgdStep(*args, **kwargs)
    _check_state(c.adv, c.clean, c.eps, c.lower, c.upper)
    _check_rows("step", c.step, c.adv)
    for name, image in (("previous", c.previous), ("top_adv", c.top_adv)):
        _check_like(name, image, c.adv, (c.adv.dtype,))
    _check_like("grad", c.grad, c.adv, _FLOAT_DTYPES)
    _check_like("top_grad", c.top_grad, c.adv, (c.grad.dtype,), "that of grad")
    _check_flags("improved", c.improved, c.adv)
    _check_flags("restart", c.restart, c.adv)
    torch._check(0 <= c.momentum <= 1, lambda: f"momentum is {c.momentum}, expected a number from 0 to 1")
    _check_pixels(c)
    apart = ("adv", "previous", "grad", "top_adv", "top_grad", "clean", "model_input")
    _check_apart({name: getattr(c, name) for name in apart})


def check_random_start(*args: Any, **kwargs: Any) -> None:
    c = RandomStart(*args, **kwargs)
    _check_state(c.adv, c.clean, c.eps, c.lower, c.upper)
    _check_apart({"adv": c.adv, "clean": c.clean})
    ids = c.sample_ids
    _check_shape("sample_ids", ids, (c.adv.shape[0],), "(one per row of adv)")
    torch._check(ids.dtype == torch.int64, lambda: f"sample_ids has dtype {ids.dtype}, expected torch.int64")
    _check_device("sample_ids", ids, "adv", c.adv)
    torch._check(c.norm in ("linf", "l2"), lambda: f"norm is {c.norm!r}, expected 'linf' or 'l2'")


def check_cosine_heads(image: Tensor, text: Tensor) -> None:
    torch._check(image.dim() == 3, lambda: f"image has shape {tuple(image.shape)}, expected (N, H, D)")
    _check_shape("text", text, image.shape, "like image")
    _check_float("image", image)
    _check_float("text", text)
    _check_device("text", text, "image", image)


def check_cosine_heads_backward(grad: Tensor, image: Tensor, text: Tensor) -> None:
    check_cosine_heads(image, text)
    _check_shape("grad", grad, image.shape[:2], "(one per sample and head)")


def check_info_nce(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, symmetric: bool = False) -> None:
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
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor
) -> None:
    check_info_nce(query, keys, labels, scale)
    _check_shape("grad", grad, (), "(the gradient of the 0-d loss)")
    _check_shape("row_lse", row_lse, query.shape[:1], "(one per row of query, from info_nce)")
    torch._check(
        tuple(column_lse.shape) in ((0,), tuple(keys.shape[:1])),
        lambda: (
            f"column_lse has shape {tuple(column_lse.shape)}, expected ({keys.shape[0]},), or (0,) for one direction"
        ),
    )


def check_sigmoid_loss(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor) -> None:
    check_info_nce(query, keys, labels, scale)
    _check_shape("bias", bias, (), "(a 0-d tensor)")
    _check_float("bias", bias)
    _check_device("bias", bias, "query", query)


def check_sigmoid_loss_backward(
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
) -> None:
    check_sigmoid_loss(query, keys, labels, scale, bias)
    _check_shape("grad", grad, (), "(the gradient of the 0-d loss)")


def _check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    _check_shape(name, tensor, x.shape, "like x")
    torch._check(tensor.dtype == x.dtype, lambda: f"{name} has dtype {tensor.dtype}, expected {x.dtype} like x")
    _check_device(name, tensor, "x", x)


def check_gated_activation(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> None:
    _check_float("x", x)
    if other is not None:
        _check_like_x("other", other, x)
    torch._check(kind in RATES, lambda: f"kind is {kind!r}, expected one of {', '.join(RATES)}")


def check_gated_activation_backward(grad: Tensor, x: Tensor, other: Tensor | None, kind: str) -> None:
    check_gated_activation(x, other, kind)
    _check_like_x("grad", grad, x)


CHECKS: dict[str, Callable[..., None]] = {
    "pgd_linf_step_": check_pgd_step,
    "pgd_l2_step_": check_pgd_step,
    "apgd_linf_step_": check_apgd_step,
    "apgd_l2_step_": check_apgd_step,
    "random_start_": check_random_start,
    "cosine_heads": check_cosine_heads,
    "cosine_heads_backward": check_cosine_heads_backward,
    "info_nce": check_info_nce,
    "info_nce_backward": check_info_nce_backward,
    "sigmoid_loss": check_sigmoid_loss,
    "sigmoid_loss_backward": check_sigmoid_loss_backward,
    "gated_activation": check_gated_activation,
    "gated_activation_backward": check_gated_activation_backward,
}


def _fake_cosine_heads(image: Tensor, text: Tensor) -> Tensor:
    return image.new_empty(image.shape[:2], dtype=compute_dtype(image, text))


def _fake_cosine_heads_backward(grad: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape), text.new_empty(text.shape)


def _fake_info_nce(
    query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query, keys, scale)
    columns = keys.shape[:1] if symmetric else (0,)
    return (
        query.new_empty((), dtype=dtype),
        query.new_empty(query.shape[:1], dtype=dtype),
        query.new_empty(columns, dtype=dtype),
    )


def _fake_info_nce_backward(
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), scale.new_empty(())


def _fake_sigmoid_loss(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return query.new_empty((), dtype=compute_dtype(query, keys, scale, bias))


def _fake_sigmoid_loss_backward(
    grad: Tensor, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), scale.new_empty(()), bias.new_empty(())


def _fake_gated_activation(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Tensor:
    return x.new_empty(x.shape)


def _fake_gated_activation_backward(grad: Tensor, x: Tensor, other: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if other is None else x.shape)


# Other operators write into their arguments and return nothing.
_FAKE_RESULTS: dict[str, Callable[..., Any]] = {
    "cosine_heads": _fake_cosine_heads,
    "cosine_heads_backward": _fake_cosine_heads_backward,
    "info_nce": _fake_info_nce,
    "info_nce_backward": _fake_info_nce_backward,
    "sigmoid_loss": _fake_sigmoid_loss,
    "sigmoid_loss_backward": _fake_sigmoid_loss_backward,
    "gated_activation": _fake_gated_activation,
    "gated_activation_backward": _fake_gated_activation_backward,
}


def _define(name: str) -> None:
    LIBRARY.define(name + SCHEMAS[name])

    def fake(*args: Any, **kwargs: Any) -> Any:
        CHECKS[name](*args, **kwargs)
        return _FAKE_RESULTS[name](*args, **kwargs) if name in _FAKE_RESULTS else None

    torch.library.register_fake(f"cmai_fast::{name}", fake, lib=LIBRARY)


for _name in SCHEMAS:
    _define(_name)
