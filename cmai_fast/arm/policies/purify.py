"""Purify the picture, ask again, and answer if the new answer is consistent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmai_fast.arm.pictures import Change, blurred, changed, read, resized
from cmai_fast.arm.policies.policy import Case, Decision, policy
from cmai_fast.attacks import ATTACKS, Victim, targeted
from cmai_fast.pipeline import alone, in_parts
from cmai_fast.preprocessing.jpeg import jpeg
from cmai_fast.threat import ThreatModel

_METHODS = ("blur", "jpeg", "resize", "counter", "anti-adversary")


@policy("purify", label="Purify the picture, ask again, and check the new answer")
@dataclass(frozen=True)
class Purify:
    """Answers from a purified picture if S_c of the new answer reaches the threshold.

    Of 200 questions to `easyvqa-llava` (PGD-10 at 8/255, last iterate; 59% right and 41% wrong without), right and
    wrong: `counter` 91% and 6%, `blur` and `jpeg` 70% and 25%, `resize` 67% and 26%. `anti-adversary` adds nothing (59%
    and 36%): it makes the model surer of the answer that the attack gave it. An attack through the move of `counter`
    gets 18% wrong.

    Args:
        method: `blur`, `jpeg` or `resize` encodes the picture again, at the size at which the model reads it. `counter`
            moves it away from its own image features in a small ball, since features of adversarial pictures move
            easily (test-time counter-attack, Xing et al., 2025). `anti-adversary` raises the model's confidence in its
            own answer (Alfarra et al., 2022).
        sigma: of `blur`, in pixels.
        quality: of `jpeg`, 1 to 95.
        scale: of `resize`, the share of each side that is kept.
        eps, steps: of `counter` and `anti-adversary`: radius of the L_inf ball, and PGD steps of size eps / 4.
        seed: of the random start of `counter`.
    """

    method: str = "counter"
    sigma: float = 1.0
    quality: int = 50
    scale: float = 0.5
    eps: float = 8 / 255
    steps: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"purify: method is {self.method!r}; expected one of {', '.join(_METHODS)}")
        for name, least, most in (
            ("sigma", 0, 100),
            ("quality", 0, 95),
            ("scale", 0, 1),
            ("eps", 0, 1),
            ("steps", 0, 1000),
        ):
            value = getattr(self, name)
            if not least < value <= most:
                raise ValueError(f"purify: {name} is {value}; expected a number above {least} and up to {most}")

    def decide_batch(self, cases: Sequence[Case]) -> list[Decision | None]:
        return in_parts(len(cases), lambda rows: self._decide(cases[rows]))

    def _decide(self, cases: Sequence[Case]) -> list[Decision | None]:
        pipeline = cases[0].pipeline
        pictures = self._purified(cases)
        said = zip(cases, *pipeline.answer([case.sample for case in cases], pictures), strict=True)
        return [
            case.decision(answer, "purify", method=self.method, score=score) if score >= case.threshold else None
            for case, answer, score in said
        ]

    def _purified(self, cases: Sequence[Case]) -> list[Tensor]:
        if self.method in ("counter", "anti-adversary"):
            return self._moved(cases)
        changes: dict[str, Change] = {
            "blur": lambda picture: blurred(picture, self.sigma),
            "jpeg": lambda picture: jpeg(picture, self.quality),
            "resize": lambda picture: resized(picture, self.scale),
        }
        images, pixels = read(cases)
        return images.split(changed(images, pixels, [changes[self.method]] * len(cases)))

    def _moved(self, cases: Sequence[Case]) -> list[Tensor]:
        pipeline = cases[0].pipeline
        with alone(pipeline.model, pipeline.processor.tokenizer):
            batch = pipeline.on_device(pipeline.collate([case.answered for case in cases]))
            victim = Victim(pipeline.bridge, pipeline.space, batch)
            own = self.method == "anti-adversary"
            result = ATTACKS["pgd"](
                victim, victim.pixels(), ThreatModel("linf", self.eps), steps=self.steps, seed=self.seed,
                sample_ids=torch.zeros(len(cases), dtype=torch.int64),  # the same start whatever the batch
                loss=targeted(batch) if own else "feature-distance",
                step_size=self.eps / 4, random_start=not own, early_stop=False,
            )  # fmt: skip
            return victim.split(result.adv)
