"""A small model that reads colours, so that attacks have something to break. Fitted once per process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from cmai_fast.bridge import Bridge, task_loss
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import Sample, VQACollator, load_dataset
from cmai_fast.pipeline import Pipeline

ACCEPTS_ALL = Threshold(-99.0, 0.05, 100, "calibration")


def make_heads(model: Any) -> ConsistencyHeads:
    bridge = Bridge(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16).eval()


@cache
def colours() -> list[Sample]:
    """Twelve questions about the colours of twelve pictures, two each of six colours."""
    data, kept, pictures = load_dataset("easyvqa", "test"), [], set()
    room = dict.fromkeys(("black", "blue", "green", "red", "teal", "yellow"), 2)
    for sample in (data[i] for i in range(len(data))):
        picture = sample.images[0].tobytes()
        if sample.prompt.startswith("what color") and room.get(sample.answer, 0) and picture not in pictures:
            room[sample.answer] -= 1
            pictures.add(picture)
            kept.append(sample)
        if not any(room.values()):
            return kept
    raise AssertionError("too few questions about colours")


_fitted: list[Pipeline] = []


def fitted(make_tiny: Any) -> Pipeline:
    """Right on all of `colours`, and as fragile as a fitted model is. Leave it as it is."""
    if _fitted:
        return _fitted[0]
    model, processor = make_tiny()
    bridge, batch = Bridge(model), VQACollator(processor)(colours())
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(60):
        loss = task_loss(*bridge.fuse(bridge.encode_image(batch["pixel_values"]), **text)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    threshold = Threshold(0.0, 0.05, 100, "calibration")
    _fitted.append(Pipeline("undefended", model.eval(), processor, make_heads(model), threshold))
    return _fitted[0]


def save(folder: Path, model: Any, processor: Any, heads: ConsistencyHeads | None) -> Path:
    """As a run leaves it: `folder/model`, which is returned, and `folder/cmcv`."""
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    if heads is not None:
        heads.save_pretrained(folder / "cmcv", ACCEPTS_ALL)
    return folder / "model"
