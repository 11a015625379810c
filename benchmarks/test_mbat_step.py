"""One training step of each inner solver on the bundled model, against a clean fine-tuning step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cmai_fast.evaluation.experiment import training_batches
from cmai_fast.evaluation.overhead import CLEAN_STEP, stepper
from cmai_fast.evaluation.subject import Subject
from cmai_fast.mbat import MBATConfig

SOLVERS: dict[str, dict[str, Any]] = {
    "clean": CLEAN_STEP,
    "fgsm": {"inner": "fgsm"},
    "bridge-r0": {"inner": "bridge", "refreshes": 0},
    "bridge-r1": {"inner": "bridge", "refreshes": 1},
    "pgd-10": {"inner": "pgd"},
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_training_step(benchmark, tmp_path: Path, solver: str) -> None:
    benchmark.group = "training step, easyvqa-llava, batch 64"
    subject = Subject.load("easyvqa-llava")
    batch = next(training_batches(subject, "easyvqa", 64, 0))
    _, step = stepper(subject, MBATConfig(output_dir=str(tmp_path), report_to="none"), SOLVERS[solver])
    benchmark.pedantic(step, args=(batch,), rounds=5, warmup_rounds=1)
