"""A round of JPEG, and its straight-through gradient."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmai_fast.pixels import levels


def save_options(quality: int) -> dict[str, Any]:
    """Of `PIL.Image.save`, for a file that holds what `jpeg` returns."""
    return {"format": "JPEG", "quality": quality}


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """The 8-bit picture (H, W, 3) after a round of JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **save_options(quality))
    with Image.open(file) as decoded:
        return np.asarray(decoded.convert("RGB"))


def through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """8-bit pictures (n, 3, H, W) in [0, 1] after a round of JPEG; the gradient passes as if there were none (BPDA,
    Athalye et al., 2018)."""
    pictures = levels(pixels).cpu().permute(0, 2, 3, 1).numpy()
    real = torch.from_numpy(np.stack([jpeg(picture, quality) for picture in pictures])).permute(0, 3, 1, 2)
    return pixels + (real.to(pixels) / 255 - pixels.detach())
