"""Resizing of 8-bit pictures as Pillow and torchvision do it, differentiable: two matrices and two roundings.

An output pixel is a weighted mean of the input pixels around its own place, the weights being those of a kernel that is
stretched when the picture shrinks. Width and height are resized one after the other. On a CPU both libraries round to
8 bits after each of the two passes, and Pillow 13 begins with the one that costs less; elsewhere torchvision rounds
once, at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys (1981) with a = -1/2."""
    x = x.abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)), 0.0)


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x)


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "bicubic": _bicubic, "bilinear": _bilinear, "lanczos": _lanczos, "box": _box, "hamming": _hamming, "nearest": _box,
}  # fmt: skip


# Mean deviation in levels from which on another guess may be better: the two orders of the passes differ by 0.1.
_HARDLY = 0.02


@functools.lru_cache(maxsize=256)
def matrix(size: int, target: int, kernel: str) -> Tensor:
    """(target, size) float32: the weights that make `target` pixels of a line of `size` pixels. Each row sums to 1."""
    scale = size / target
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    places = torch.arange(size, dtype=torch.float64) + 0.5
    # `nearest` takes one pixel however far the picture shrinks; where it grows, it is the box.
    weights = KERNELS[kernel]((places - centre[:, None]) / (1.0 if kernel == "nearest" else max(scale, 1.0)))
    return (weights / weights.sum(1, keepdim=True)).float()


def to_levels(pixels: Tensor) -> Tensor:
    """Pixels rounded to k/255 in [0, 1]; the gradient passes as if they were not (straight-through)."""
    # Halves go up, as in both libraries: many a weighted mean is one, and float32 puts it a little below. The gradient
    # also passes where the box cuts: a white pixel is 1.0000001 after a weighted mean.
    exact = pixels.detach()
    return pixels + ((exact * 255 + 0.5001).floor().clamp(0, 255) / 255 - exact)


class Resampling(NamedTuple):
    """How a picture is resized.

    kernel: of `KERNELS`. twice: it is rounded to 8 bits after each pass, not only at the end. tall_first: its height is
    resized before its width.
    """

    kernel: str
    twice: bool = True
    tall_first: bool = False

    def __call__(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """Pixels (..., H, W) in [0, 1] to (..., height, width), on the grid k/255."""
        tall = matrix(pixels.shape[-2], height, self.kernel).to(pixels)
        wide = matrix(pixels.shape[-1], width, self.kernel).to(pixels).T
        half = tall @ pixels if self.tall_first else pixels @ wide
        half = to_levels(half) if self.twice else half
        return to_levels(half @ wide if self.tall_first else tall @ half)


def resampling_of(before: Tensor, after: Tensor, first: Resampling | None = None) -> tuple[Resampling, float]:
    """How `before` (..., H, W), random pixels in [0, 1], were made `after` (..., h, w): the nearest, and its largest
    deviation in levels. `first` is tried first, and taken if hardly any pixel differs."""
    ways = ((True, False), (True, True), (False, False))
    nearest, found = float("inf"), (Resampling("bicubic"), float("inf"))
    for guess in [*([first] if first else []), *(Resampling(k, *way) for way in ways for k in KERNELS)]:
        apart = (guess(before, *after.shape[-2:]) - after).abs() * 255
        if (mean := float(apart.mean())) < nearest:
            nearest, found = mean, (guess, float(apart.max()))
        if mean < _HARDLY:
            break
    return found
