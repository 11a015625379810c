"""An objective that remembers where it was asked for gradients."""

from __future__ import annotations

from torch import Tensor

from cmai_fast.attacks import Evaluation, Objective


class Recording(Objective):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: list[tuple[list[int], Tensor]] = []

    def gradient(self, model_input: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Evaluation]:
        named = range(len(self)) if rows is None else rows.tolist()
        mean, std = self.space.like(model_input)
        self.asked.append((list(named), model_input * std + mean))
        return super().gradient(model_input, rows)
