"""Recall@K of image-text retrieval, in both directions, with any number of captions per image."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

DIRECTIONS = ("image-to-text", "text-to-image")


def recall_at(similarity: ArrayLike, owner: ArrayLike, k: int, direction: str) -> float:
    """Share of the queries with a right answer among the k best, in [0, 1] (Karpathy and Fei-Fei, 2015, section 4.1).

    Image to text: an image counts if any of its texts is among its k most similar ones. Text to image: a text counts if
    an image of it is among its k most similar ones. Equal scores rank by index, so a model that scores everything the
    same finds what chance finds.

    Args:
        similarity: (images, texts), higher is nearer; finite. An array or a CPU tensor.
        owner: (texts,) int, the image of each text; or (images, texts) bool, if a text may belong to several images.
            What belongs to nothing is no query.
        k: how many answers are looked at, at least 1.
        direction: `image-to-text` or `text-to-image`.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, an image without texts (of `owner` by number),
            nothing that belongs together, an unknown direction.
    """
    scores = np.asarray(similarity)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"similarity has shape {scores.shape}; expected (images, texts), at least one of each")
    if not np.isfinite(scores).all():
        raise ValueError("similarity has values that are NaN or infinite; expected finite values")
    if k < 1 or direction not in DIRECTIONS:
        raise ValueError(f"k = {k}, direction {direction!r}; expected k >= 1 and one of {', '.join(DIRECTIONS)}")
    right = _right(np.asarray(owner), *scores.shape)
    if direction == "text-to-image":
        scores, right = scores.T, right.T
    asked = np.flatnonzero(right.any(1))
    return float(np.mean([_rank(scores[i], np.flatnonzero(right[i])) < k for i in asked]))


def _right(owner: np.ndarray, images: int, texts: int) -> np.ndarray:
    """(images, texts) bool, what belongs together."""
    if owner.dtype == bool:
        if owner.shape != (images, texts) or not owner.any():
            raise ValueError(f"owner is bool {owner.shape} with {owner.sum()} pairs; expected {(images, texts)}, some")
        return owner
    if owner.shape != (texts,) or not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(f"owner is {owner.dtype} {owner.shape}; expected whole numbers ({texts},), an image per text")
    if set(owner.tolist()) != set(range(images)):
        raise ValueError(f"owner has other images than 0 to {images - 1}; expected an image per text, each named")
    return owner == np.arange(images)[:, None]


def _rank(row: np.ndarray, own: np.ndarray) -> int:
    """How many candidates come before the best of the right ones."""
    best = own[np.argmax(row[own])]  # of equal ones the first
    return int((row > row[best]).sum() + (row[:best] == row[best]).sum())
