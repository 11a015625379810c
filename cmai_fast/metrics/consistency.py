"""Consistency: the share of groups in which every sample is right."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from numpy.typing import ArrayLike

from cmai_fast.metrics.accuracy import verdicts


def consistency(right: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Share of groups whose samples are all right, in [0, 1] (NLVR2: Suhr et al., 2019, section 5).

    Args:
        right: (N,) bool, one verdict per sample.
        groups: N names. For NLVR2 a group is a sentence: `nlvr2_sentence(identifier)`.

    Raises:
        ValueError: no samples, verdicts that are not bool, or a different number of groups.
    """
    array = verdicts(right, "right")
    if len(array) != len(groups):
        raise ValueError(f"{len(groups)} groups for {len(array)} samples; expected one per sample")
    whole: dict[Hashable, bool] = {}
    for good, group in zip(array, groups, strict=True):
        whole[group] = whole.get(group, True) and bool(good)
    return sum(whole.values()) / len(whole)


def nlvr2_sentence(identifier: str) -> str:
    """The sentence of an NLVR2 identifier, without its third field: `dev-850-0-1` and `dev-850-3-1` are one sentence.

    Raises:
        ValueError: an identifier of another form.
    """
    fields = identifier.split("-")
    if len(fields) != 4:
        raise ValueError(f"NLVR2 identifier {identifier!r}; expected split-set-pair-sentence, such as dev-850-0-1")
    return "-".join([*fields[:2], "", fields[3]])
