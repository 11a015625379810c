"""Attacked questions of the bundled model, as the cases of a guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from cmai_fast.arm.policies import Case, Decision
from cmai_fast.arm.policies.policy import decide
from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.data import Sample, load_dataset
from cmai_fast.data.pictures import read_picture
from cmai_fast.pipeline import Pipeline
from cmai_fast.pixels import round_to_8bit
from cmai_fast.tasks import TASKS
from cmai_fast.threat import ThreatModel


@pytest.fixture(scope="session")
def bundled() -> Pipeline:
    return Pipeline.load("easyvqa-llava")


@dataclass
class Attacked:
    """Cases of attacked questions (PGD-10, 16/255, rounded to 8 bits), at the threshold of the model.

    The clean accuracy of the model is 99%.
    """

    cases: list[Case]
    samples: Sequence[Sample]

    def right(self, decisions: Sequence[Decision | None]) -> int:
        rows = zip(decisions, self.samples, strict=True)
        return sum(bool(d and d.answer is not None and TASKS["vqa"].score(d.answer, s)) for d, s in rows)

    def brought_back(self, decisions: Sequence[Decision | None]) -> int:
        """Right answers to questions that the model itself answers wrongly, which `reject` alone loses."""
        rows = zip(decisions, self.samples, self.cases, strict=True)
        return self.right([d if TASKS["vqa"].score(case.answer, s) < 1 else None for d, s, case in rows])

    @property
    def own(self) -> int:
        """How many the model itself still answers rightly."""
        return self.right([case.decision(case.answer, "answer") for case in self.cases])

    def ask(self, policy: Any) -> list[Decision | None]:
        pipeline = self.cases[0].pipeline
        return decide(policy.bind(pipeline) if hasattr(policy, "bind") else policy, self.cases)


@pytest.fixture(scope="session")
def attacked(bundled: Pipeline) -> Attacked:
    data = load_dataset("easyvqa", "test", limit=24, seed=5)
    samples = [data[i] for i in range(len(data))]
    victim = Victim(bundled.bridge, bundled.space, bundled.collate(samples))
    threat = ThreatModel("linf", 16 / 255)
    found = ATTACKS["pgd"](victim, victim.pixels(), threat, steps=10, seed=0)
    pictures = victim.pictures(round_to_8bit(found.adv, victim.pixels(), threat))
    asked = [
        replace(s, images=tuple(map(read_picture, several)), references=())
        for s, several in zip(samples, pictures, strict=True)
    ]
    answers, scores = bundled.answer(asked)
    assert bundled.threshold is not None
    tau = bundled.threshold.tau
    cases = [Case(*row, tau, bundled) for row in zip(asked, answers, scores, strict=True)]
    attacked = Attacked(cases, samples)
    assert attacked.own <= 12, "an attack that breaks nothing would prove nothing"
    return attacked


@pytest.fixture
def state() -> Callable[[Any], list[tuple[Any, ...]]]:
    """The bits, storage, mode and gradients of a model, and the global random state."""

    def of(model: Any) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [
            (k, v.data_ptr(), v._version, v.requires_grad, v.grad, v.detach().clone().view(torch.uint8).sum().item())
            for k, v in model.state_dict(keep_vars=True).items()
        ]
        return [*found, *((n, m.training) for n, m in model.named_modules()), (torch.get_rng_state().sum().item(),)]

    return of
