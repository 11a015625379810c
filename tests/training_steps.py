"""A training step, all that comes of it, and memory that runs out in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmai_fast.mbat import MBATTrainer

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"


def scarce(trainer: MBATTrainer, most: int, place: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory runs out there for more than `most` samples at once; returns the sizes that were tried."""
    tried: list[int] = []

    def limited(run: Any, size: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)  # the work is done, and its gradients are there, when memory runs out
            tried.append(size(*args, **kwargs))
            if tried[-1] > most:
                raise torch.OutOfMemoryError(FULL)
            return result

        return call

    if place == "encode":
        trainer.bridge.encode_image = limited(trainer.bridge.encode_image, lambda x, **_: len(x))
    elif place == "fuse":
        trainer.bridge.fuse = limited(trainer.bridge.fuse, lambda x, **_: len(x))
    elif place == "clean backward":
        trainer._clean_branch = limited(trainer._clean_branch, lambda leaf, *_: len(leaf))
    elif place == "attack":
        trainer._attack = limited(trainer._attack, lambda objective, *_: len(objective))
    elif place == "adversarial branch":
        trainer._language_side = limited(trainer._language_side, lambda inputs, *_, **__: len(inputs["labels"]))
    else:
        side = lambda parts: max(len(v.leaf) for p in parts for v in p.views)  # noqa: E731
        trainer._vision_side = limited(trainer._vision_side, side)
    return tried


def of_step(trainer: MBATTrainer, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """In float64: an attack takes signs of gradients, some of which are zero but for rounding."""
    for part in (trainer.model, trainer.heads):
        part.double()
    values = batch["pixel_values"].double()
    total = trainer.training_step(trainer.model, {**batch, "pixel_values": values})
    parameters = {
        **dict(trainer.model.named_parameters()),
        **{f"heads.{k}": p for k, p in trainer.heads.named_parameters()},
    }
    grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    logs = {f"log {k}": torch.tensor(sum(v)) for k, v in trainer._sums.items()}
    return {"total": total, **grads, **logs}


def same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-6, atol: float = 1e-9
) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=rtol, atol=atol, msg=name)
