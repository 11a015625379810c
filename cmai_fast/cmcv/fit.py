"""Fits heads to a frozen model, for CMCV alone and as the starting point of MBAT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cmai_fast.bridge import ModelBridge, frozen
from cmai_fast.cmcv.calibration import Threshold, calibrate
from cmai_fast.cmcv.heads import ConsistencyHeads
from cmai_fast.cmcv.loss import contrastive_loss, packed_text, text_groups
from cmai_fast.data.collate import negative_texts
from cmai_fast.generation import Generation


def fit_heads(
    bridge: ModelBridge,
    heads: ConsistencyHeads,
    batches: Iterator[Mapping[str, Tensor]],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Trains `heads` for `steps` batches with the contrastive loss, on features of the model, which is not changed.

    Args:
        batches: as `VQACollator(processor, negatives=K)` makes them.
        on_step: called with (step, loss), for a progress bar.
    """
    optimizer = torch.optim.AdamW(heads.parameters(), learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 1), pct_start=0.1)
    with frozen(bridge.model):
        heads.train()
        for step in range(steps):
            batch = next(batches)
            images, text = bridge.inputs(batch)
            wrong = negative_texts(batch, text)
            with torch.no_grad():
                image = bridge.encode_image(batch["pixel_values"], **images)
                own = bridge.encode_text(**text)
                other = bridge.encode_text(**wrong) if wrong else None
            loss = contrastive_loss(
                heads,
                heads.project_image(image, bridge.image_tokens(text)),
                heads.project_text(own),
                None if other is None else heads.project_text(other),
                groups=text_groups(packed_text(*bridge.own_texts(text))),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step, loss.item())
        heads.eval()


def fit_threshold(
    scores: Tensor,
    split: str,
    false_rejection_rate: float = 0.05,
    generation: Generation | None = None,
    fingerprint: Mapping[str, str] | None = None,
) -> Threshold:
    """The threshold that rejects at most this share of clean `scores` (N,).

    Args:
        scores: S_c of inputs from `split` with the answers that the model generated under `generation`.
    """
    tau = calibrate(scores.cpu().numpy(), false_rejection_rate)
    return Threshold(tau, false_rejection_rate, len(scores), split, generation, fingerprint)
