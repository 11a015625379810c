"""Vote over noised or augmented copies of the picture."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmai_fast.arm.pictures import Change, answers, blurred, changed, read, shifted
from cmai_fast.arm.policies.policy import Case, Decision, policy
from cmai_fast.data import Sample
from cmai_fast.metrics.exact_match import folded
from cmai_fast.preprocessing.jpeg import jpeg

_CHANGES = ("noise", "augment")


@policy("smooth", label="Vote over changed copies of the picture")
@dataclass(frozen=True)
class Smooth:
    """Asks the model about copies of the picture, and answers with the majority if it is large enough.

    The prediction of randomised smoothing (Cohen et al., 2019), for answers of any length. Of 200 questions to
    `easyvqa-llava` (PGD-10 at 8/255, last iterate; 59% right and 41% wrong without), right and wrong: `augment` 85% and
    2%, `noise` 74% and 19%. An attack on the mean over the noise gets 28% wrong: noise adds little against those who
    know of it.

    Args:
        draws: copies per case; all copies of all cases are answered in few calls of the model.
        change: `augment` shifts by up to a 16th of each side, then blurs, applies JPEG, or neither; `noise` adds
            Gaussian noise, and the pixels are clipped to [0, 1].
        sigma: standard deviation of `noise`, in the [0, 1] pixel range at the size at which the model reads.
        agreement: the least share of the votes for an answer.
        batch_size: copies per call of the model.
        seed: None: noise of the system's entropy, which an attacker cannot know. A number: the same noise for every
            case, so that decisions can be repeated.
    """

    draws: int = 16
    change: str = "augment"
    sigma: float = 32 / 255
    agreement: float = 0.75
    batch_size: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.draws < 1 or self.batch_size < 1:
            raise ValueError(
                f"smooth: draws is {self.draws} and batch_size {self.batch_size}; expected at least 1 of each"
            )
        if self.change not in _CHANGES:
            raise ValueError(f"smooth: change is {self.change!r}; expected {' or '.join(_CHANGES)}")
        if not 0 < self.sigma <= 1:
            raise ValueError(
                f"smooth: sigma is {self.sigma}; expected a number above 0 and up to 1 for pixels in [0, 1], such as "
                "8/255"
            )
        if not 0 < self.agreement <= 1:
            raise ValueError(f"smooth: agreement is {self.agreement}; expected a share above 0 and up to 1")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"smooth: seed is {self.seed}; expected at least 0, or None for noise nobody can foresee")

    def decide_batch(self, cases: Sequence[Case]) -> list[Decision | None]:
        said = answers(cases[0].pipeline, self._copies(cases), self.batch_size)
        return [self._counted(case, said[i :: len(cases)]) for i, case in enumerate(cases)]

    def _copies(self, cases: Sequence[Case]) -> Iterator[tuple[Sample, Tensor]]:
        """The first copy of every case, then the second, and so on."""
        images, pixels = read(cases)
        own, samples = images.split(pixels), [case.sample for case in cases]
        # A generator per case, so that a decision does not depend on the batch.
        seeds = [secrets.randbits(63) if self.seed is None else self.seed for _ in cases]
        noises = [torch.Generator(pixels.device).manual_seed(seed) for seed in seeds]
        chances = [np.random.default_rng(seed) for seed in seeds]
        for _ in range(self.draws):
            if self.change == "noise":
                copies = [self._noised(*each) for each in zip(own, noises, strict=True)]
            else:
                copies = images.split(changed(images, pixels, list(map(_augmentation, chances))))
            yield from zip(samples, copies, strict=True)

    def _noised(self, pixels: Tensor, noise: torch.Generator) -> Tensor:
        drawn = torch.randn(pixels.shape, generator=noise, device=pixels.device, dtype=pixels.dtype)
        return (pixels + self.sigma * drawn).clamp(0, 1)

    def _counted(self, case: Case, said: Sequence[str]) -> Decision | None:
        votes = Counter(map(folded, said))
        winner, count = votes.most_common(1)[0]
        if count / len(said) < self.agreement:
            return None
        answer = next(a for a in said if folded(a) == winner)
        # The model's own words if that is what it says, so that its answer does not count as replaced.
        answer = case.answer if folded(case.answer) == winner else answer
        return case.decision(answer, "smooth", votes=dict(votes.most_common()))


def _augmentation(chance: np.random.Generator) -> Change:
    down, right = chance.uniform(-1, 1, 2) / 16
    kind, blur, quality = chance.integers(3), chance.uniform(0.3, 1.2), int(chance.integers(40, 91))

    def change(picture: np.ndarray) -> np.ndarray:
        moved = shifted(picture, round(down * picture.shape[0]), round(right * picture.shape[1]))
        return moved if kind == 0 else blurred(moved, blur) if kind == 1 else jpeg(moved, quality)

    return change
