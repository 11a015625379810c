"""How well a score separates clean from adversarial inputs.

Clean inputs should score higher, and a detector rejects what scores **below** its threshold. A true positive is
a rejected adversarial input, a false positive a rejected clean one. Scores are (n,) arrays or CPU tensors; empty
or non-finite ones raise ValueError.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def auroc(clean: ArrayLike, adversarial: ArrayLike) -> float:
    """P(clean > adversarial) + P(clean = adversarial) / 2 over all pairs, exact; 0.5 is chance, 1 is perfect."""
    good, bad = _scores(clean, "clean"), np.sort(_scores(adversarial, "adversarial"))
    below = np.searchsorted(bad, good, side="left")
    not_above = np.searchsorted(bad, good, side="right")
    return int((below + not_above).sum()) / (2 * len(good) * len(bad))


def roc_curve(clean: ArrayLike, adversarial: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(fpr, tpr), both rising from 0 to 1: one point for every threshold that changes a verdict.

    Points on a straight line between their neighbours are left out; the curve and its area are the same without them.
    """
    good, bad = np.sort(_scores(clean, "clean")), np.sort(_scores(adversarial, "adversarial"))
    thresholds = np.unique(np.concatenate([good, bad]))
    rejected = np.stack([np.searchsorted(s, thresholds, side="left") for s in (good, bad)])
    rejected = np.column_stack([rejected, [len(good), len(bad)]])
    bends = np.any(np.diff(rejected, n=2) != 0, axis=0)
    kept = rejected[:, np.concatenate([[True], bends, [True]])]
    return kept[0] / len(good), kept[1] / len(bad)


def threshold_at_fpr(clean: ArrayLike, fpr: float) -> float:
    """The highest threshold that rejects at most the share `fpr` of these clean scores; 0 <= fpr < 1."""
    if not 0 <= fpr < 1:
        raise ValueError(f"a share of {fpr!r} of the clean inputs to reject; expected 0 <= share < 1, such as 0.05")
    good = np.sort(_scores(clean, "clean"))
    # 0.29 * 100 is 28.999...96 in floating point; the share asked for is 29 of 100.
    return float(good[math.floor(fpr * len(good) + 1e-9)])


def threshold_interval(
    clean: ArrayLike, fpr: float, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of `threshold_at_fpr`, by the percentile bootstrap over these clean scores."""
    good, rng = _scores(clean, "clean"), np.random.default_rng(seed)
    found = [threshold_at_fpr(rng.choice(good, len(good)), fpr) for _ in range(resamples)]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def tpr_at_fpr(clean: ArrayLike, adversarial: ArrayLike, fpr: float) -> float:
    """Share of the adversarial inputs rejected when at most the share `fpr` of the clean ones is; 0 <= fpr < 1."""
    return float((_scores(adversarial, "adversarial") < threshold_at_fpr(clean, fpr)).mean())


def _scores(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} scores have shape {array.shape}; expected (n,) with at least one score")
    broken = int((~np.isfinite(array)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(array)} {name} scores are NaN or infinite; expected finite scores")
    return array
