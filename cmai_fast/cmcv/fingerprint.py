"""A fingerprint of a model and its processor: a threshold holds for those that it was set with, and no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

_PER_TENSOR = 8
_NUMBERS = ("image_mean", "image_std", "rescale_factor", "do_resize", "do_center_crop")
_SIZES = ("size", "crop_size")
_EXACT = (torch.float32, torch.bfloat16)  # loaded in either, the same weights have the same fingerprint


def fingerprint(model: Any, processor: Any) -> dict[str, str]:
    """`weights` and `processor`, each a digest.

    Of each weight a few values are read, in bfloat16. Weights in other formats (float16, 4 and 8 bits) have no
    `weights`: how they are rounded depends on the format.
    """
    found = {"processor": _digest(_described(processor))}
    named = [*model.named_parameters()]
    if all(p.dtype in _EXACT for _, p in named):
        found["weights"] = _digest({name: _sample(p) for name, p in named})
    return found


def changed(saved: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """What both have and is not the same."""
    return [what for what in saved if what in own and saved[what] != own[what]]


def _sample(weights: torch.Tensor) -> list[Any]:
    flat = weights.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, min(_PER_TENSOR, len(flat))).long().to(flat.device)
    return [list(weights.shape), flat[places].to(torch.bfloat16).float().tolist()]


def _described(processor: Any) -> dict[str, Any]:
    """What changes the model's inputs, and is the same in every implementation of an image processor."""
    images, tokenizer = processor.image_processor, processor.tokenizer
    read: dict[str, Any] = {name: getattr(images, name, None) for name in _NUMBERS}
    sizes = {name: getattr(images, name, None) for name in _SIZES}
    return {
        "numbers": {k: [float(x) for x in (v if isinstance(v, (list, tuple)) else [v or 0])] for k, v in read.items()},
        "sizes": {k: {name: n for name, n in dict(v).items() if n} for k, v in sizes.items() if isinstance(v, Mapping)},
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None),
    }


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str, sort_keys=True).encode(), digest_size=12).hexdigest()
