"""One training step of each inner solver on the bundled model, against a clean fine-tuning step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.overhead import CLEAN_STEP, stepper
from cmai_fast.mbat import MBATConfig
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows.samples import training_batches, training_samples

SOLVERS: dict[str, dict[str, Any]] = {
    "bridge R = 0": {"inner": "bridge", "refreshes": 0},
    "bridge R = 1": {"inner": "bridge", "refreshes": 1},
    "pgd K = 10": {"inner": "pgd"},
    "one step": {"inner": "fgsm"},
    "clean": CLEAN_STEP,
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_training_step(side_by_side, device: torch.device, tmp_path: Path) -> None:
    subject = Pipeline.load("easyvqa-llava")
    batch = next(training_batches(subject, training_samples(DataSource("easyvqa"), "vqa"), 64, 0))
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=device.type == "cpu")
    steps = {name: stepper(subject, args, changes)[1] for name, changes in SOLVERS.items()}
    side_by_side(
        "training step, easyvqa-llava, batch 64",
        {name: lambda step=step: step(batch) for name, step in steps.items()},
        device=device,
        rounds=5,
    )
