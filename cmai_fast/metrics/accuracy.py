"""What "right", "robust" and "fooled" mean, over one boolean per sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def accuracy(right: ArrayLike) -> float:
    """Share of samples that are right. `right`: (N,) bool. Raises ValueError when empty."""
    return float(verdicts(right, "right").mean())


def worst_case(*right: ArrayLike) -> np.ndarray:
    """(N,) bool: right on every input tried for the sample, from one (N,) bool array per attack of the suite.

    The clean input lies in every ball, so pass its verdicts too: Acc_robust is `accuracy(worst_case(clean, *attacks))`
    and never above Acc_clean.
    """
    if not right:
        raise ValueError("worst_case got no verdicts; expected one boolean array for each kind of input")
    columns = [verdicts(r, f"input {i} of worst_case") for i, r in enumerate(right)]
    _same_length(*columns)
    return np.logical_and.reduce(columns)


def attack_success_rate(right_before: ArrayLike, right_after: ArrayLike) -> float | None:
    """ASR: share of the samples right before the attack that are wrong after it; both (N,) bool.

    None if no sample was right before: there was nothing to break.
    """
    before, after = verdicts(right_before, "right_before"), verdicts(right_after, "right_after")
    _same_length(before, after)
    return float((~after[before]).mean()) if before.any() else None


def rejection_accuracy(
    clean_right: ArrayLike, clean_accepted: ArrayLike, *attacked: tuple[ArrayLike, ArrayLike]
) -> float:
    """Robust accuracy with rejection: the clean input is accepted and right, every attacked one right or rejected.

    Args:
        clean_right, clean_accepted: (N,) bool.
        attacked: for each attack the pair (right, accepted), (N,) bool each.
    """
    good = worst_case(clean_right, clean_accepted)
    for right, accepted in attacked:
        right, accepted = verdicts(right, "right"), verdicts(accepted, "accepted")
        _same_length(good, right, accepted)
        good = good & (right | ~accepted)
    return float(good.mean())


def verdicts(values: ArrayLike, name: str) -> np.ndarray:
    """(N,) bool. Raises ValueError for another shape or dtype, or none at all; `name` is what the error calls it."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != bool or not len(array):
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; expected one bool per sample, at least one sample"
        )
    return array


def _same_length(*arrays: np.ndarray) -> None:
    if len({len(a) for a in arrays}) > 1:
        raise ValueError(f"verdicts over {[len(a) for a in arrays]} samples; expected the same samples in each")
