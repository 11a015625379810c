"""Confidence intervals by bootstrap over samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 1 << 22  # drawn indices in memory at once: 32 MiB


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the mean of one value per sample, by the percentile bootstrap (Efron, 1979).

    Args:
        values: (n,), bool (an accuracy) or float; finite. If all are equal, the width is 0: the sample shows
            no variation, which does not mean that the mean is known.
        confidence: share of resampled means inside the interval, between 0 and 1.
        resamples: how many times n samples are drawn with replacement.
        seed: the same seed gives the same interval.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"values have shape {array.shape}; expected (n,) finite values, at least one")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence {confidence}, resamples {resamples}; expected 0 < confidence < 1, resamples >= 1")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(array))
    means = [
        array[rng.integers(len(array), size=(min(rows, resamples - start), len(array)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
