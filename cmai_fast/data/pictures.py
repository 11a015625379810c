"""The reader of pictures: any input becomes 8-bit RGB as a viewer would show it, or an error says why not. Guard,
collator, commands and data formats all use it, so they all see the same pixels.

Colour profiles (ICC) are not applied; the loaders of data sets do not apply them either.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# A PSD opens as its composite, and an MPO (which many phones and cameras name .jpg) as its main photo.
_FIRST_FRAME_IS_THE_PICTURE = ("PSD", "MPO")
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode "I" holds 0 to 65535, as Pillow reads them
_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags; a photometric interpretation of 0 means that zero is white
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CHANNELS = (1, 3, 4)


def read_picture(image: Any, name: str = "image") -> Image.Image:
    """`image` as an 8-bit RGB picture, as a viewer would show it.

    EXIF orientation is applied. Transparent pixels are shown on white. 16-bit gray levels are scaled to 8 bits.

    Args:
        image: one of

            - a path (`~` is the home folder) or a `data:image/...;base64,` URL;
            - the bytes of an image file, an open binary file (read from its start), or the dict `{"bytes", "path"}` in
              which `datasets` stores a picture;
            - a PIL picture;
            - a NumPy array or PyTorch tensor (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels: uint8, uint16
              (0 to 65535), bool, or floats in [0, 1], which are rounded to 8 bits as a saved file would be.
        name: its name in errors, which also give the path.

    Raises:
        ValueError: a missing, empty, unreadable or truncated file, too large for Pillow (`Image.MAX_IMAGE_PIXELS`),
            several frames or pages, NaN, values out of range, an ambiguous depth or shape, or not a picture.
    """
    if isinstance(image, Mapping):
        image, name = _of_dict(image, name)
    if isinstance(image, str) and image.startswith("data:"):
        image = _of_data_url(image, name)
    if isinstance(image, Image.Image):
        return _shown(image, name)
    if isinstance(image, (str, os.PathLike)):
        name = f"{name} {str(image)!r:.200}"
        return _decoded(_of_path(image, name), name)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decoded(image, name)
    if hasattr(image, "read"):
        name = f"{name} {image.name!r}" if isinstance(getattr(image, "name", None), str) else name
        return _decoded(_of_file(image, name), name)
    if hasattr(image, "detach"):  # a tensor; PyTorch need not be imported to read a file
        image = image.detach().cpu()
        image = np.asarray(image.float() if image.is_floating_point() else image)
    if isinstance(image, (list, tuple)) or not hasattr(image, "__array__"):
        raise ValueError(
            f"{name} is {image!r:.80} ({type(image).__name__}); expected one picture: a path, a PIL picture, the bytes "
            "of a file, an array or a tensor"
        )
    return _shown(_of_array(np.asarray(image), name), name)


def expected_size(processor: Any) -> tuple[int, int] | None:
    """(height, width) of the image processor's output; None if it does not have a fixed size."""
    images = processor.image_processor
    cut = getattr(processor, "images_kwargs", {}).get("crop_to_patches", getattr(images, "crop_to_patches", False))
    if cut or getattr(images, "image_grid_pinpoints", None):  # the size is that of tiles
        return None
    size = getattr(images, "crop_size" if getattr(images, "do_center_crop", False) else "size", None)
    fixed = dict(size) if size else {}
    return (fixed["height"], fixed["width"]) if {"height", "width"} <= set(fixed) else None


def _of_dict(image: Mapping[str, Any], name: str) -> tuple[Any, str]:
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is None:
        raise ValueError(
            f"{name} is a dict with {', '.join(map(repr, image)) or 'no keys'}, and has neither bytes nor a path; "
            "expected {'bytes': ..., 'path': ...} as `datasets` stores a picture"
        )
    if content is None:
        return path, name
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ValueError(f"{name} has {type(content).__name__} under 'bytes'; expected the bytes of an image file")
    return content, name if path is None else f"{name} {str(path)!r}"


def _of_path(path: str | os.PathLike[str], name: str) -> bytes:
    if re.match(r"\w+://", str(path)):
        raise ValueError(f"{name} is a URL, and nothing is downloaded; expected a file. Download it first")
    try:
        if Path(path).expanduser().is_file():
            return Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a name too long, no such home
        raise ValueError(f"{name} cannot be opened ({error}); expected the path of an image") from error
    raise ValueError(f"{name} is not a file; expected the path of an image")


def _of_data_url(url: str, name: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.startswith("data:image/") or not head.endswith(";base64"):
            raise ValueError(f"it starts with {head!r:.60}")
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ValueError(
            f"{name} is a data URL that cannot be read ({error}); expected data:image/...;base64,..."
        ) from error


def _of_file(file: Any, name: str) -> bytes:
    """The whole file, from its start; the file position is restored, so it can be read again."""
    if hasattr(file, "seekable") and file.seekable():
        place = file.tell()
        file.seek(0)
        content = file.read()
        file.seek(place)
    else:
        content = file.read()
    if not isinstance(content, bytes):
        raise ValueError(
            f"{name} is a file that returns {type(content).__name__}; expected one opened in binary mode, 'rb'"
        )
    return content


def _decoded(content: bytes | bytearray | memoryview, name: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} cannot be read as an image ({len(content)} bytes of no known format); expected a whole PNG, JPEG "
            "or another format that Pillow reads"
        ) from None
    except Exception as error:  # each decoder has its own exceptions; also too many pixels
        raise ValueError(f"{name} cannot be read as an image ({error}); expected a whole image file") from error
    return _shown(picture, name)


def _shown(picture: Image.Image, name: str) -> Image.Image:
    """The decoded pixels (a truncated file fails here), upright, on white, in 8-bit RGB, without metadata."""
    if 0 in picture.size:
        raise ValueError(f"{name} is {picture.width} x {picture.height} pixels; expected a picture that is not empty")
    if picture.format == "EPS":
        raise ValueError(f"{name} is EPS, a program that Ghostscript would run; expected PNG, JPEG or the like")
    try:
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format not in _FIRST_FRAME_IS_THE_PICTURE:
            raise _RefusedError(
                f"{name} has {frames} frames or pages ({picture.format}); expected one picture. Save the one that is "
                "asked about, or pass it as picture.convert('RGB')"
            )
        picture.load()
        tags = getattr(picture, "tag_v2", {})  # of a TIFF
        shown = _eight_bits(_upright(picture), picture.format, 2 ** tags.get(_BITS, (16,))[0] - 1, name)
        if picture.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == 0:  # Pillow inverts only 8-bit images
            shown = ImageOps.invert(shown)
        return _on_white(shown)
    except _RefusedError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded ({error}); the file is truncated or damaged") from error


class _RefusedError(ValueError):
    """A message that is complete already, as opposed to a decoder's failure."""


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # viewers ignore damaged EXIF
        orientation = 1
    how = _UPRIGHT.get(orientation)
    return picture if how is None else picture.transpose(how)


def _eight_bits(picture: Image.Image, file_format: str | None, white: int, name: str) -> Image.Image:
    mode, clear = picture.mode, picture.info.get("transparency")
    if mode.startswith("I;16") or (mode == "I" and file_format in _SIXTEEN_BITS):
        levels = np.asarray(picture).astype(np.int64)
        gray = Image.fromarray(_scaled(levels, white))
        if clear is not None:
            gray.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
        return gray
    if mode == "F":
        return Image.fromarray(_of_floats(np.asarray(picture), name))
    if mode == "I":
        raise _RefusedError(
            f"{name} has mode 'I' (32-bit levels), whose white is not known; expected 8 or 16 bits. Scale it to "
            "0 to 255 and pass it as uint8"
        )
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
        assert shown is not None  # None only if it works in place
        return shown
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("La", "RGBa"):  # premultiplied
        picture = picture.convert(picture.mode.upper())
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB") if picture.mode != "RGB" else picture.copy()
    picture.info = {}  # EXIF and transparency have been applied
    return picture


def _scaled(levels: np.ndarray, white: int = 65535) -> np.ndarray:
    """Levels from 0 to `white`, scaled and rounded to 0 to 255."""
    return ((levels.astype(np.int64) * 255 + white // 2) // white).astype(np.uint8)


def _of_array(array: np.ndarray, name: str) -> Image.Image:
    array = _channels_last(array, name)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        if 0 < array.max() <= 255:
            raise ValueError(
                f"{name} is uint16 with values up to {array.max()}, which would look black; expected 0 to 65535. "
                "Pass 8-bit levels as uint8"
            )
        array = _scaled(array)
    elif np.issubdtype(array.dtype, np.floating):
        array = _of_floats(array, name)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"{name} has dtype {array.dtype}; expected uint8, uint16, bool, or floats in [0, 1]. Pass 8-bit levels as "
            "uint8"
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2 and array.size:
        return array[..., None]
    first, last = (array.ndim == 3 and array.shape[side] in _CHANNELS for side in (0, 2))
    if not array.size or not (first or last):
        raise ValueError(
            f"{name} has shape {array.shape}; expected one picture (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels"
        )
    if first and last:
        raise ValueError(
            f"{name} has shape {array.shape}, in which the channels may be first or last; pass a PIL picture, which is "
            "unambiguous"
        )
    return array if last else array.transpose(1, 2, 0)


def _of_floats(array: np.ndarray, name: str) -> np.ndarray:
    broken = int((~np.isfinite(array)).sum())
    if broken:
        raise _RefusedError(f"{name} has {broken} NaN or infinite values; expected floats in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise _RefusedError(
            f"{name} has floats from {low:g} to {high:g}; expected [0, 1]. Divide 0 to 255 by 255, clip values "
            "slightly outside, and undo a processor's normalisation"
        )
    exact = array.astype(np.promote_types(array.dtype, np.float32))  # float16 is too coarse for 255 levels
    return np.round(exact * 255).astype(np.uint8)
