"""The threshold below which an input counts as inconsistent, set on held-out clean inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import ArrayLike

from cmai_fast.generation import Generation
from cmai_fast.metrics import threshold_at_fpr


@dataclass(frozen=True)
class Threshold:
    """`tau`, and how it was set: an input is rejected if and only if its S_c is below it.

    Attributes:
        tau: finite.
        false_rejection_rate: the share of clean inputs that it may reject.
        samples: the number of clean inputs it was set on.
        split: their split; never the test split.
        generation: how the answers were generated on whose S_c it was set. A pipeline with this threshold generates
            in the same way. None: unknown, for a threshold set by hand.
        fingerprint: of the model and processor that it was set with (`cmcv.fingerprint`); a pipeline refuses it with
            others. None: unknown.
    """

    tau: float
    false_rejection_rate: float
    samples: int
    split: str
    generation: Generation | None = None
    fingerprint: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.tau):
            raise ValueError(f"tau is {self.tau}; expected a finite number, calibrate again")
        if not 0 <= self.false_rejection_rate < 1:
            raise ValueError(f"false_rejection_rate is {self.false_rejection_rate}; expected 0 <= rate < 1")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; expected at least 1 clean input")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Threshold:
        """The reverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: not a record of a threshold.
        """
        generation = record["generation"]
        return cls(**{**record, "generation": None if generation is None else Generation.from_dict(generation)})


def calibrate(scores: ArrayLike, false_rejection_rate: float = 0.05) -> float:
    """The highest tau for which `score < tau` rejects at most that share of these clean scores.

    Args:
        scores: (n,) S_c of clean inputs with the model's own answers, from a split that nothing was fitted to.
        false_rejection_rate: 0 <= rate < 1.

    Raises:
        ValueError: no scores, NaN or infinite ones, or a rate outside [0, 1).
    """
    return threshold_at_fpr(scores, false_rejection_rate)
