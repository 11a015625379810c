"""The contrastive loss that teaches the heads what agrees (InfoNCE, van den Oord et al., 2018, both ways)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cmai_fast import ops
from cmai_fast.cmcv.heads import ConsistencyHeads

_IN_BATCH_SHARE = 0.2


def packed_text(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, L) int64: the unmasked tokens of each row, then -1. input_ids, attention_mask: (N, L), padded anywhere."""
    kept, order = attention_mask.bool().sort(dim=1, descending=True, stable=True)
    return torch.where(kept, input_ids.gather(1, order), -1)


def text_groups(packed: Tensor) -> Tensor:
    """(N,) int64: the same number for rows that hold the same text; packed: (N, L) from `packed_text`."""
    return packed.unique(dim=0, return_inverse=True)[1]


def contrastive_loss(
    heads: ConsistencyHeads,
    image: Tensor,
    text: Tensor,
    text_negative: Tensor | None = None,
    *,
    groups: Tensor | None = None,
) -> Tensor:
    """InfoNCE over the batch; with wrong answers, right answer against wrong ones + 0.2 * InfoNCE. 0-d, differentiable.

    A wrong answer differs from the right one by a word, most texts of a batch differ by their whole question, and many
    of them are true of the image too. In one softmax with them, the wrong answer hardly counts (on easy-VQA, one among
    64, the heads prefer the right answer in 66% of pairs), so it has a softmax of its own (85%).

    Args:
        heads: whose temperature is used.
        image, text: projections (N, dim) of images and of their own texts, not normalised.
        text_negative: (N * K, dim), row i * K + k is a wrong answer to the question of row i. It is a negative for
            image i alone, since it may be true of another image.
        groups: (N,) int64, the same number for rows that hold the same text (`cmcv.text_groups`): they are no negatives
            for each other. None: all texts differ.

    Raises:
        ValueError: shapes that do not fit.
    """
    n, dim = image.shape
    if text.shape != image.shape:
        raise ValueError(
            f"text projections {tuple(text.shape)}, image projections {tuple(image.shape)}; expected equal"
        )
    image, text, scale = F.normalize(image, dim=-1), F.normalize(text, dim=-1), heads.scale
    if groups is not None and groups.shape != (n,):
        raise ValueError(f"groups has shape {tuple(groups.shape)}; expected ({n},): one for each row")
    own = torch.arange(n, device=image.device)
    in_batch = ops.info_nce(image, text, own, scale, symmetric=True, groups=groups)
    if text_negative is None:
        return in_batch
    if not len(text_negative) or len(text_negative) % n or text_negative.shape[1:] != (dim,):
        raise ValueError(
            f"text_negative has shape {tuple(text_negative.shape)}; expected ({n} * K, {dim}): K for each row"
        )
    wrong = F.normalize(text_negative, dim=-1).view(n, -1, dim)
    answers = torch.cat([text.unsqueeze(1), wrong], dim=1)  # the right one first
    logits = scale * torch.einsum("nd,nkd->nk", image, answers)
    return _IN_BATCH_SHARE * in_batch + F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))
