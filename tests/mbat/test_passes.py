"""What a step is said to cost is what the trainer counts in it."""

from __future__ import annotations

from typing import Any

import pytest

from cmai_fast.data import VQACollator
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat.passes import StepSettings, step_passes


@pytest.fixture
def trainer_of(make_tiny, tmp_path):
    """`trainer_of(**config)` without S_c unless it is asked for."""

    def make(**config: Any) -> MBATTrainer:
        settings: dict[str, Any] = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "inner_steps": 3}
        model, processor = make_tiny()
        args = MBATConfig(**settings | {"beta": 0.0, "gamma": 0.0, "arm": False} | config)
        return MBATTrainer(model, args, VQACollator(processor), processing_class=processor)

    return make


@pytest.mark.parametrize(
    "config",
    [
        {"inner": "none"},
        {"inner": "pgd"},
        {"inner": "pgd", "lam": 1.0},
        {"inner": "fgsm"},
        {"inner": "bridge"},
        {"inner": "bridge", "lam": 1.0},
        {"inner": "bridge", "refreshes": 1},
        {"inner": "bridge", "refreshes": 2},
        {"inner": "bridge", "refreshes": 3},
        {"objective": "fare", "inner": "pgd", "lam": 1.0},
        {"objective": "fare", "inner": "pgd", "lam": 0.5},
        {"objective": "sim-clip", "inner": "fgsm", "lam": 1.0},
    ],
)
def test_passes_of_a_step(trainer_of, batch, config):
    trainer = trainer_of(**config)
    trainer.training_step(trainer.model, batch)
    assert trainer.passes == step_passes(trainer.args).total == step_passes(StepSettings(inner_steps=3, **config)).total


def test_heads_read_texts(trainer_of, batch):
    """The true response and a wrong one of each sample, where the batch has one."""
    own = {k: v for k, v in batch.items() if not k.startswith("negative_")}
    for inputs, texts in ((batch, 2), (own, 1)):
        trainer = trainer_of(beta=0.1, gamma=0.5)
        trainer.training_step(trainer.model, dict(inputs))
        assert trainer.passes == step_passes(trainer.args, texts).total
