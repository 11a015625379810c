"""Images as people hand them in, checked: a file, a picture or an array becomes 8-bit RGB, or an error says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def expected_size(processor: Any) -> tuple[int, int] | None:
    """(height, width) that the processor's image processor ends with; None where it takes pictures of any size."""
    images = processor.image_processor
    cut = getattr(processor, "images_kwargs", {}).get("crop_to_patches", getattr(images, "crop_to_patches", False))
    if cut or getattr(images, "image_grid_pinpoints", None):  # tiles of that size
        return None
    size = getattr(images, "crop_size" if getattr(images, "do_center_crop", False) else "size", None)
    fixed = dict(size) if size else {}
    return (fixed["height"], fixed["width"]) if {"height", "width"} <= set(fixed) else None


def read_image(image: Any, size: tuple[int, int] | None = None, name: str = "image") -> Image.Image:
    """`image` as an 8-bit RGB picture.

    Args:
        image: a path, a PIL picture of 8-bit channels, a uint8 array (H, W, 3), or a float array (H, W, 3) in [0, 1],
            which is rounded to 8 bits as a saved file would be.
        size: the (height, width) it must have; None takes any.
        name: what errors call it; a path is named itself.

    Raises:
        ValueError: not there, not readable (truncated), NaN, out of range, of the wrong layout or size.
    """
    if isinstance(image, (str, Path)):
        name = f"{name} {str(image)!r}"
        image = _open(Path(image), name)
    if isinstance(image, Image.Image):
        picture = _to_rgb(image, name)
    else:
        picture = Image.fromarray(_to_uint8(np.asarray(image), name))
    if size is not None and (picture.height, picture.width) != size:
        raise ValueError(
            f"{name} is {picture.height} x {picture.width} pixels; the model takes {size[0]} x {size[1]} "
            "(height x width). Pass resize=True to let the processor resize it"
        )
    return picture


def _open(path: Path, name: str) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"{name} is not a file; expected the path of an image")
    try:
        return Image.open(path)
    except Exception as error:  # decoders of many formats, each with exceptions of its own
        raise ValueError(f"{name} cannot be read as an image ({error}); expected a whole PNG or JPEG") from error


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has mode {picture.mode!r}; expected 8-bit channels. Convert it to 8 bits first")
    try:
        return picture.convert("RGB")  # decodes the pixels: a truncated file is found here
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded ({error}); the file is truncated or damaged") from error


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; expected (height, width, 3), channels last")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} has dtype {array.dtype}; expected uint8, or floats in [0, 1]")
    broken = int((~np.isfinite(array)).sum())
    if broken:
        raise ValueError(f"{name} has {broken} NaN or infinite values; expected floats in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise ValueError(f"{name} has floats from {low:g} to {high:g}; expected [0, 1]; divide 0 to 255 by 255")
    return np.round(array * 255).astype(np.uint8)
