"""The pictures of cases as the model reads them, small changes of them, and the answers to changed copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from cmai_fast.arm.policies.policy import Case
from cmai_fast.bridge import BatchImages
from cmai_fast.data import Sample
from cmai_fast.pipeline import Pipeline, alone, in_parts

Change = Callable[[np.ndarray], np.ndarray]  # of an 8-bit picture (H, W, C), to one of the same shape


def read(cases: Sequence[Case]) -> tuple[BatchImages, Tensor]:
    """The images of these cases, at the size at which the model reads them, and their pixels in [0, 1]."""
    pipeline = cases[0].pipeline
    with alone(pipeline.model, pipeline.processor.tokenizer), torch.no_grad():
        images = pipeline.images([case.answered for case in cases])
        return images, images.pixels()


def changed(images: BatchImages, pixels: Tensor, changes: Sequence[Change]) -> Tensor:
    """Pixels of the pictures after these changes, one per sample."""
    rows = zip(images.pictures(pixels), changes, strict=True)
    return images.from_pictures([[change(picture) for picture in several] for several, change in rows]).to(pixels)


def answers(pipeline: Pipeline, copies: Iterable[tuple[Sample, Tensor]], batch_size: int) -> list[str]:
    """The model's answer to each copy, a sample and its pixels as `BatchImages.split` gives them.

    `batch_size` copies are made and answered at a time, fewer if these do not fit into memory.
    """
    said: list[str] = []
    remaining: Iterator[tuple[Sample, Tensor]] = iter(copies)
    while rows := list(islice(remaining, batch_size)):
        samples, pixels = [s for s, _ in rows], [p for _, p in rows]
        said += in_parts(len(rows), lambda at: pipeline.generate(samples[at], pixels[at]))  # noqa: B023  # called at once
    return said


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur; `sigma` in pixels."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def resized(picture: np.ndarray, scale: float) -> np.ndarray:
    """Down to `scale` of each side, and back."""
    height, width = picture.shape[:2]
    small = Image.fromarray(picture).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    return np.asarray(small.resize((width, height)))


def shifted(picture: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved by whole pixels; the edge is repeated where nothing is left."""
    height, width = picture.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return picture[rows][:, columns]
