"""The input and output of a policy, and the registry. Importing it does not load PyTorch: names are checked early."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cmai_fast.files import plain
from cmai_fast.registry import Registry

if TYPE_CHECKING:
    from cmai_fast.data import Sample
    from cmai_fast.pipeline import Pipeline


@dataclass(frozen=True)
class Decision:
    """What the guard decided about one image and one question.

    Attributes:
        answer: shown to the user; None if it is withheld.
        score: S_c of the image and the question with the model's answer, in [-1, 1]. NaN (a broken model) is never
            answered.
        threshold: tau; lower scores go to the policies.
        route: "answer", or the name of the policy that decided.
        question: as asked.
        withheld_answer: the model's own answer if it differs from `answer`; for a reviewer, never for the user. None if
            `answer` is the model's own.
        id: of the sample, if it has one.
        details: added by the policy, such as votes; values that JSON can hold.
    """

    answer: str | None
    score: float
    threshold: float
    route: str
    question: str
    withheld_answer: str | None = None
    id: str | int | None = None
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> str:
        """One line of JSON, with all attributes; a score that is not finite is null."""
        record = asdict(self) | {"score": self.score if math.isfinite(self.score) else None}
        return json.dumps(plain(record), allow_nan=False)


@dataclass(frozen=True)
class Case:
    """One question whose answer scored below the threshold.

    Attributes:
        sample: the images, as 8-bit RGB pictures, and the question.
        answer: the model's answer, withheld so far.
        score: S_c of that answer.
        threshold: tau.
        pipeline: the model, for policies that query it again.
    """

    sample: Sample
    answer: str
    score: float
    threshold: float
    pipeline: Pipeline

    def decision(self, answer: str | None, route: str, **details: Any) -> Decision:
        """The decision of the policy called `route`."""
        withheld = None if answer == self.answer else self.answer
        return Decision(
            answer, self.score, self.threshold, route, self.sample.prompt, withheld, self.sample.id, details
        )


@dataclass(frozen=True)
class Policy:
    """`policy(case)` gives a decision, or None to pass the case on to the next policy."""

    name: str
    label: str
    decide: Callable[[Case], Decision | None]

    def __call__(self, case: Case) -> Decision | None:
        return self.decide(case)


POLICIES: Registry[Policy] = Registry("policy", "cmai_fast.arm.policies", frozenset({"policy"}))


def policy(
    name: str, *, label: str
) -> Callable[[Callable[[Case], Decision | None]], Callable[[Case], Decision | None]]:
    """Registers a function as the policy `name`; `label` is its name in lists."""

    def register(decide: Callable[[Case], Decision | None]) -> Callable[[Case], Decision | None]:
        POLICIES.add(name, Policy(name, label, decide))
        return decide

    return register
