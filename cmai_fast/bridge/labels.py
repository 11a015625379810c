"""Labels, the loss L_task at them, and whether a response is the model's greedy answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def check_labels(labels: Tensor, first: int = 1) -> None:
    """Raises ValueError if a row of `labels` (N, L) has no target from column `first` on."""
    empty = ~(labels[:, first:] != IGNORE).any(1)
    if empty.any():
        after = " after its first token" if first else ""
        raise ValueError(
            f"row {int(empty.nonzero()[0])} of labels holds only -100{after}, so it has no target; "
            "give every sample a response"
        )


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """L_task (N,) of each sample: mean cross-entropy over its target tokens, float32 or better.

    logits (N, L', V), targets (N, L'), as from a bridge's `fuse`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    return losses.sum(1) / (targets != IGNORE).sum(1)


def is_right(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether every target token is the most likely one, (N,) bool.

    True if and only if greedy generation gives exactly this response: with a right prefix, the next token comes from
    the same logits.
    """
    return ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(1)
