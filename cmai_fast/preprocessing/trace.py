"""Where each pixel that a processor makes comes from: its image processor is run on coordinates instead of colours.

Cropping, padding, tiling and flattening move pixels and do not change them, so coordinates written into the channels of
a picture come out at the places where its colours would. Only resizing mixes pixels. It is the method `resize` of the
image processor, which is replaced: it notes what it is given, and returns new coordinates of the size that it would
return. How it mixes is found with random pixels (`resampling_of`). So no code is needed for a family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from cmai_fast.preprocessing.resampling import Resampling, resampling_of

# Node numbers start here, so that what fills up a picture (0 to 255) is no node.
_FIRST = 1000
# On random pixels torch's integer weights differ from Pillow's by a level, and another kernel by tens.
_SLACK = 2.5


@dataclass(frozen=True)
class Places:
    """Where each of some pixels comes from: arrays of one shape (..., h, w).

    node: the number of a node; negative: of none, the pixel is filling. row, column: of the pixel in that node.
    """

    node: np.ndarray
    row: np.ndarray
    column: np.ndarray

    @classmethod
    def read(cls, tags: np.ndarray) -> Places:
        """From coordinates (..., 3, h, w) as `coordinates` writes them."""
        row, column, node = (np.rint(tags[..., k, :, :]).astype(np.int64) for k in range(3))
        node = np.where(node >= _FIRST, node - _FIRST, -1)
        return cls(node, np.where(node < 0, 0, row), np.where(node < 0, 0, column))


@dataclass(frozen=True)
class Node:
    """A picture (`source` is None), or one that was resized from pixels of earlier nodes.

    number: of the picture. filling: (3, H, W) in [0, 1], the values of `source` where it has no node.
    """

    height: int
    width: int
    number: int = -1
    source: Places | None = None
    filling: np.ndarray | None = None
    how: Resampling | None = None


def coordinates(node: int, height: int, width: int) -> np.ndarray:
    """(3, height, width) float32: row, column, and the node's number."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, _FIRST + node)]).astype(np.float32)


def numbered(number: int, size: tuple[int, int]) -> Image.Image:
    """A black picture (width, height) that holds its number in its first pixel."""
    picture = Image.new("RGB", size)
    picture.putpixel((0, 0), ((number >> 16) & 255, (number >> 8) & 255, number & 255))
    return picture


class Trace:
    """Stands in the place of an image processor, which is not changed, and makes coordinates of `numbered` pictures.

    nodes: the pictures and their resized versions, in the order in which they were met.
    """

    def __init__(self, image_processor: Any) -> None:
        self._own = copy.copy(image_processor)
        self._resize, self._own.resize = image_processor.resize, self._traced
        self._name = type(image_processor).__name__
        self._known: dict[Any, tuple[int, int, Resampling] | None] = {}
        self._last: Resampling | None = None
        self.nodes: list[Node] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_own":  # while it is copied, before __init__ has run
            raise AttributeError(name)
        return getattr(self._own, name)

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        return self._own(images=self._tagged(images), **{**kwargs, "input_data_format": "channels_last"})

    def _tagged(self, images: Any) -> Any:
        if isinstance(images, (list, tuple)):
            return [self._tagged(image) for image in images]
        first = np.asarray(images)[0, 0].astype(int)
        self.nodes.append(Node(images.height, images.width, int(first @ (65536, 256, 1))))
        return coordinates(len(self.nodes) - 1, images.height, images.width).transpose(1, 2, 0)

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        """In place of `resize`: coordinates (..., 3, H, W) of an array or a tensor, of which it may be a stack."""
        # The first argument, whose name differs between families.
        name = None if args else next(k for k, v in kwargs.items() if hasattr(v, "shape"))
        image = args[0] if name is None else kwargs.pop(name)

        def resize(pixels: np.ndarray) -> Any:
            given = torch.from_numpy(pixels) if isinstance(image, torch.Tensor) else pixels
            return self._resize(given, *args[1:], **kwargs) if name is None else self._resize(**{name: given}, **kwargs)

        shape = tuple(image.shape)
        key = (shape[-2:], repr(args[1:]), repr(kwargs))
        if key not in self._known:
            self._known[key] = self._study(shape, resize)
        if (found := self._known[key]) is None:
            return image
        height, width, how = found
        tags, made = np.asarray(image, dtype=np.float32).reshape(-1, *shape[-3:]), []
        for each in tags:
            places = Places.read(each)
            filling = each / 255 if (places.node < 0).any() else None
            self.nodes.append(Node(height, width, -1, places, filling, how))
            made.append(coordinates(len(self.nodes) - 1, height, width))
        stack = np.stack(made).reshape(*shape[:-2], height, width)
        return torch.from_numpy(stack).to(image.device) if isinstance(image, torch.Tensor) else stack

    def _study(self, shape: tuple[int, ...], resize: Callable[[np.ndarray], Any]) -> tuple[int, int, Resampling] | None:
        """What `resize` does to images of this shape; None: nothing."""
        before = np.random.default_rng(0).integers(0, 256, shape[-3:], dtype=np.uint8)
        before = before.reshape(*[1] * (len(shape) - 3), *shape[-3:])
        after = resize(before)
        if not hasattr(after, "shape") or tuple(after.shape[:-2]) != before.shape[:-2]:
            raise ValueError(
                f"{self._name}.resize returns {type(after).__name__} instead of one image (channels, height, width), "
                "so the processor cannot be followed to the uploaded picture; attack the model's input (--threat "
                "input)"
            )
        after = np.asarray(after)
        if after.shape == before.shape and (after == before).all():
            return None
        height, width = after.shape[-2:]
        old, new = (torch.from_numpy(x.astype(np.float32) / 255) for x in (before, after))
        how, deviation = resampling_of(old, new, self._last)
        if deviation > _SLACK:
            raise ValueError(
                f"{self._name}.resize from {shape[-2]} x {shape[-1]} to {height} x {width} is none of the known linear "
                f"ones: the nearest ({how.kernel}) deviates by {deviation:.1f} of 255 levels. Attack the model's input "
                "(--threat input)"
            )
        self._last = how
        return height, width, how
