"""The answers of a model to a set of images, clean or attacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from cmai_fast.attacks import Passes


@dataclass
class Answers:
    """The model's answers to images of some samples.

    rows: indices of the samples (M of N). predictions: generated texts. right: (M,) bool, by the task. scores: S_c (M,)
    of image, prompt and that answer; None without heads.
    """

    rows: list[int]
    predictions: list[str]
    right: np.ndarray
    scores: np.ndarray | None


@dataclass
class Attacked(Answers):
    """The result of an attack on the samples that it ran on; verdicts are those of `Answers`.

    right_8bit, predictions_8bit: for the images rounded to 8 bits inside the ball. fooled: (M,) bool, the attack's own
    fast verdict (exact match under teacher forcing). forwards, backwards: (M,) passes of the whole model that each
    sample was in, those that judge the result not counted. nonfinite, zero_gradients: (M,) as in `AttackResult`.
    images: of each row, in [0, 1], as `BatchImages.split` returns them, if the runner keeps them. prompts: (M,) what
    the attack put in place of prompts, or lists of captions; None if it does not change them. details: (M,) what the
    attack says of each sample, by name.
    """

    predictions_8bit: list[str]
    right_8bit: np.ndarray
    fooled: np.ndarray
    passes: Passes
    seconds: float
    forwards: np.ndarray
    backwards: np.ndarray
    nonfinite: np.ndarray
    zero_gradients: np.ndarray
    images: Mapping[int, Tensor] = field(repr=False)
    prompts: list[Any] | None = None
    details: dict[str, list[Any]] = field(default_factory=dict)

    def among(self, mask: np.ndarray) -> Attacked:
        """Only of the samples in `mask` (N,) bool; passes and seconds stay those of all."""
        keep = mask[self.rows]
        places = np.flatnonzero(keep).tolist()
        return replace(
            self,
            rows=[self.rows[k] for k in places],
            predictions=[self.predictions[k] for k in places],
            predictions_8bit=[self.predictions_8bit[k] for k in places],
            scores=None if self.scores is None else self.scores[keep],
            prompts=None if self.prompts is None else [self.prompts[k] for k in places],
            details={name: [values[k] for k in places] for name, values in self.details.items()},
            **{
                name: getattr(self, name)[keep]
                for name in ("right", "right_8bit", "fooled", "forwards", "backwards", "nonfinite", "zero_gradients")
            },
        )

    def over(self, count: int, values: np.ndarray, rest: bool = True) -> np.ndarray:
        """`values` (M,) at the attacked rows of all `count` samples, `rest` at the others."""
        whole = np.full(count, rest)
        whole[self.rows] = values
        return whole
