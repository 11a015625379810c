"""Latency of an accepted answer, one question at a time: the answer alone, and with the verifier's score."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from cmai_fast.data.sources import DataSource
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows.samples import asked

# Of both bundled models: the verifier of the one has a tower of its own, that of the other reads the model's features.
MOST = {"easyvqa-llava": 1.3, "easyvqa-llava-immune": 1.05}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("name", MOST)
def test_accepted_answer(side_by_side, device: torch.device, name: str) -> None:
    pipeline = Pipeline.load(name, device=str(device))
    samples = asked(DataSource("easyvqa"), "test", "vqa", 64)
    guarded, plain = cycle(samples), cycle(samples)  # both answer the same questions in turn
    side_by_side(
        f"an accepted answer, {name}, batch 1",
        {
            "answer and score": lambda: pipeline.answer([next(guarded)]),
            "answer": lambda: pipeline.generate([next(plain)]),
        },
        device=device,
        targets={"answer": ("at most", MOST[name])},
        rounds=64,
    )
