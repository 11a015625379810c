"""Small batches, heads and trainers around the tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmai_fast.attacks import Victim
from cmai_fast.bridge import Bridge
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.pixels import PixelSpace
from launcher import Launcher


@pytest.fixture(scope="session")
def data():
    return load_dataset("easyvqa", "train", 24, seed=3)


@pytest.fixture(scope="session")
def collate(tiny_processor):
    return VQACollator(tiny_processor, negatives=1)


@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory):
    """The tiny model and its processor, saved."""
    folder = tmp_path_factory.mktemp("whole")
    for part in make_tiny():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def launcher():
    started = Launcher()
    yield started
    started.close()


@pytest.fixture
def batch(collate, data):
    return collate([data[i] for i in range(4)])


def make_heads(model: Any, seed: int = 0) -> ConsistencyHeads:
    bridge = Bridge(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)


@pytest.fixture
def make_victim(tiny_model, tiny_processor, batch):
    """`make_victim(heads=False)` for the batch of four, on the shared model; with consistency heads or without."""
    made = make_heads(tiny_model)

    def make(heads: bool = False) -> Victim:
        space = PixelSpace.from_processor(tiny_processor)
        return Victim(Bridge(tiny_model), space, batch, made if heads else None)

    return make


@pytest.fixture
def clean(make_victim, batch):
    """Pixels (4, 3, 64, 64) in [0, 1]."""
    return make_victim().space.to_pixels(batch["pixel_values"])


@pytest.fixture
def make_trainer(make_tiny, data, tmp_path):
    """`make_trainer(model=None, callbacks=None, heads=None, eval_dataset=None, given=None, **config)`; without a model
    it makes a new tiny one, and `given` are other arguments of the trainer."""

    def make(
        *,
        model: Any = None,
        callbacks: Any = None,
        heads: Any = None,
        eval_dataset: Any = None,
        given: dict[str, Any] | None = None,
        **config: Any,
    ) -> MBATTrainer:
        tiny, processor = make_tiny()
        model = model or tiny
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "inner_steps": 2,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "gamma": 0.5,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return MBATTrainer(
            model,
            MBATConfig(**(defaults | config)),
            heads=heads or make_heads(model),
            **{
                "train_dataset": data,
                "eval_dataset": eval_dataset,
                "data_collator": VQACollator(processor, negatives=1),
                "processing_class": processor,
                "callbacks": callbacks,
            }
            | (given or {}),
        )

    return make
