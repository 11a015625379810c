"""A LLaVA whose language side costs about 20 times its vision side: what a step costs, and what an attack keeps."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from cmai_fast.attacks import Victim, exact_gradient
from cmai_fast.bridge import bridge_of, lean_activations
from cmai_fast.evaluation.overhead import SavedActivations
from cmai_fast.pixels import PixelSpace


def test_training_step(side_by_side, recipes, tmp_path: Path) -> None:
    at_size, sized_models = recipes
    sized = sized_models.MODELS["llava-100m"]()
    model = sized_models.build(sized, None, torch.device("cpu"), torch.float32)
    batch = sized.batch(2, 32, 8)
    names = ["mbat-bridge-r0", "clean", "mbat-bridge-r1"]
    runs = at_size.steps(model, sized.processor, batch, names, tmp_path, use_cpu=True)
    side_by_side(
        "training step, LLaVA of 143M, K = 10, batch 2",
        runs,
        device=torch.device("cpu"),
        targets={"clean": ("at most", 2.8)},
        rounds=5,
    )


def test_what_an_attack_keeps(side_by_side, recipes) -> None:
    """Against the same loop with weights left trainable: as it was, and with activations as lean as in the attack."""
    _, sized_models = recipes
    sized = sized_models.MODELS["llava-100m"]()
    model = sized_models.build(sized, None, torch.device("cpu"), torch.float32).requires_grad_(True).eval()
    objective = Victim(bridge_of(model), PixelSpace.from_processor(sized.processor), sized.batch(2, 32, 8))
    at = objective.space.to_model(objective.pixels())

    def gradient(context: Any) -> None:
        with context:
            exact_gradient(objective, at)

    contenders = {
        "attack": lambda: gradient(objective.attack_mode()),
        "trainable": lambda: gradient(nullcontext()),
        "trainable, lean": lambda: gradient(lean_activations(model)),
    }
    kept = {}
    for name, run in contenders.items():
        with SavedActivations(model) as held:
            run()
        kept[name] = held.peak
    side_by_side(
        "an attack's pass, LLaVA of 143M, batch 2",
        contenders,
        device=torch.device("cpu"),
        figures={
            f"saved activations over {name}": (kept["attack"] / kept[name], "at most", 0.65) for name in list(kept)[1:]
        },
        rounds=5,
    )
