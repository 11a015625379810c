"""The exact gradient, which remembers where it was asked for."""

from __future__ import annotations

from torch import Tensor

from cmai_fast.attacks import Evaluation, exact_gradient
from cmai_fast.attacks.gradients import Course, Estimate


class Recording:
    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Tensor]] = []

    def start(self, course: Course) -> Estimate:
        def estimate(model_input: Tensor, rows: Tensor | None, step: int) -> tuple[Tensor, Evaluation]:
            named = range(len(course.victim)) if rows is None else rows.tolist()
            mean, std = course.victim.space.like(model_input)
            self.asked.append((list(named), model_input * std + mean))
            return exact_gradient(course.victim, model_input, rows, course.loss)

        return estimate
