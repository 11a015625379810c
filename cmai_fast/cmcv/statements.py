"""What a data set says of each picture: all questions about it, each with its answer and others to compare it with."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.data.sample import Sample, numeric_id
from cmai_fast.data.splits import picture_key
from cmai_fast.data.statements import Statement

_NEAR, _FAR = 7, 1  # wrong answers of a statement: of its own kind, and of another


class Statements:
    """Draws statements about the picture of a sample, for a verifier's training.

    A sample is one question about a picture, and one pass of the vision side is paid for it. Whatever else the data say
    of that picture costs a verifier next to nothing: its text side is small and sees no image.

    Args:
        samples: with answers; each is read once.
        alternatives: wrong answers for those without choices; None: those of these samples.
        most: statements per sample: its own first, then others about the same picture.
        seed: a draw depends only on (seed, sample id).

    `weights` (N,) are those with which samples are drawn.

    Raises:
        ValueError: a sample has no answer, or all have the same one and there are no `alternatives`.
    """

    def __init__(
        self, samples: Sequence[Sample], alternatives: Alternatives | None = None, most: int = 4, seed: int = 0
    ) -> None:
        self.most, self.seed = most, seed
        self._others: dict[tuple[str, tuple[str, ...]], tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._said: list[tuple[str, str, tuple[str, ...]]] = []
        self._about: defaultdict[Hashable, list[int]] = defaultdict(list)
        for i in range(len(samples)):
            sample = samples[i]
            self._about[_pictures(sample)].append(i)
            self._said.append((sample.prompt, sample.answer, sample.choices))
        self.alternatives = Alternatives.among(self._said) if alternatives is None else alternatives
        self.weights = balanced(self._said)

    def __call__(self, sample: Sample) -> list[Statement]:
        """(question, (right answer, wrong answers...)) of at most `most` statements, the sample's own first."""
        rng = np.random.default_rng((self.seed, numeric_id(sample.id) % 2**64))
        own = (sample.prompt, sample.answer, sample.choices)
        others = [i for i in self._about.get(_pictures(sample), ()) if self._said[i] != own]
        drawn: Any = ()
        if others and self.most > 1:
            weights = self.weights[others]
            size = min(self.most - 1, len(others))
            drawn = rng.choice(others, size, replace=False, p=weights / weights.sum())
        return [(q, (a, *self._wrong(a, choices, rng))) for q, a, choices in (own, *(self._said[i] for i in drawn))]

    def _wrong(self, answer: str, choices: Sequence[str], rng: np.random.Generator) -> list[str]:
        key = answer, tuple(choices)
        if key not in self._others:
            self._others[key] = self.alternatives.near_and_far(answer, choices)
        near, far = self._others[key]
        return [
            answers[i]
            for answers, most in ((near, _NEAR), (far, _FAR))
            for i in rng.permutation(len(answers))[:most].tolist()
        ]


def balanced(said: Sequence[tuple[str, str, tuple[str, ...]]]) -> np.ndarray:
    """Weights (M,) with which statements (question, answer, choices) are drawn for a verifier.

    The answers to one question are equally frequent: of 24,000 questions "is there a red shape?" seven in eight are
    answered no, and a verifier that is drawn these learns to say no without looking. A kind of answers is drawn by the
    square root of its frequency, so that rare kinds are learnt too.
    """
    kinds: Counter[Any] = Counter(choices for _, _, choices in said)
    prompts: Counter[Any] = Counter((choices, question) for question, _, choices in said)
    answers: Counter[Any] = Counter(said)
    of_prompt = Counter((choices, question) for question, _, choices in answers)
    return np.array(
        [
            kinds[c] ** -0.5 * prompts[c, q] / of_prompt[c, q] / answers[q, a, c]
            for q, a, c in said
        ]
    )  # fmt: skip


def _pictures(sample: Sample) -> tuple[Hashable, ...]:
    """A key of the sample's pictures: a file by its path, others by their content."""
    return tuple(
        os.fspath(image) if isinstance(image, (str, os.PathLike)) else picture_key(image) for image in sample.images
    )
