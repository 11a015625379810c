"""Encodes the images of a batch once if two consecutive passes need them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def images_encoded_once(model: Any) -> Iterator[None]:
    """Inside, `get_image_features` returns its last output again if called with the same tensors.

    For passes without gradients. A model whose `generate` bypasses `get_image_features` (BLIP-2) encodes twice.
    """
    body = getattr(model, "model", model)
    if not hasattr(body, "get_image_features") or "get_image_features" in vars(body):
        yield
        return
    plain = body.get_image_features
    last: list[Any] = []

    @functools.wraps(plain)
    def once(*args: Any, **kwargs: Any) -> Any:
        # Callers differ in whether they omit arguments or pass None.
        asked = {k: v for k, v in kwargs.items() if v is not None and k != "return_dict"}
        key = (*args, *(part for k in sorted(asked) for part in (k, asked[k])))
        if not last or not _same(last[0], key):
            last[:] = [key, plain(*args, **{**kwargs, "return_dict": True})]
        return last[1]

    body.get_image_features = once
    try:
        yield
    finally:
        del body.get_image_features


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else type(a) is type(b) and a == b
        for a, b in zip(one, other, strict=True)
    )
