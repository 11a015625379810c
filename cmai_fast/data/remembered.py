"""An image processor with a cache of small pictures, since a data set asks several questions about each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import make_flat_list_of_images

# 5,000 pictures of 64 x 64 in float32 take 250 MB.
_SMALL, _ROOM = 64 * 64 * 3, 250_000_000


class RememberedPictures:
    """Replaces the image processor of a processor.

    If each sample has one image, every picture is encoded alone and the results are concatenated, padded at the end to
    one size if they differ (tiles). This equals the image processor's own result for the batch. Several images per
    sample, or none, go to the image processor itself, since families combine them differently.
    """

    def __init__(self, image_processor: Any) -> None:
        self._own = image_processor
        self._known: dict[Any, dict[str, Any]] = {}
        self._room = _ROOM

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_own":  # while it is copied or pickled, before __init__ has run
            raise AttributeError(name)
        return getattr(self._own, name)

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, Any]:
        if any(isinstance(own, (list, tuple)) and len(own) != 1 for own in images):
            return dict(self._own(images=images, **{**kwargs, "return_tensors": "pt"}))
        encoded = [self._encode(image, kwargs) for image in make_flat_list_of_images(images)]
        return {k: _one_after_another([e[k] for e in encoded]) for k in encoded[0]}

    def _encode(self, image: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        # RGB only: in other modes the bytes do not define the picture (a palette holds the colours).
        small = isinstance(image, Image.Image) and image.mode == "RGB" and 3 * image.width * image.height <= _SMALL
        key = (image.size, image.tobytes()) if small else None
        value = self._known.get(key)
        if value is None:
            value = dict(self._own(images=[image], **{**kwargs, "return_tensors": "pt"}))
            size = sum(v.nbytes for v in value.values() if isinstance(v, torch.Tensor))
            if key is not None and size <= self._room:
                self._known[key] = value
                self._room -= size
        return value


def _one_after_another(values: list[Any]) -> Any:
    """Concatenates lists, or tensors (n_i, ...) into (sum of n_i, ...), zero-padded at the end to the largest size."""
    if not isinstance(values[0], torch.Tensor):
        return [item for value in values for item in value]
    largest = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]
    return torch.cat([_grown(v, largest) for v in values])


def _grown(value: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    if list(value.shape[1:]) == sizes:
        return value
    missing = [n - m for n, m in zip(sizes, value.shape[1:], strict=True)]
    return F.pad(value, [side for n in reversed(missing) for side in (0, n)])
