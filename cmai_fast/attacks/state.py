"""What every image attack shares: its checked inputs, the best adversarial images so far, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.objective import Evaluation, Objective, Passes
from cmai_fast.threat import ThreatModel, check_pixels


@dataclass
class AttackResult:
    """Adversarial images of a batch.

    adv: like `clean`, (N, C, H, W) or units of a `Layout`, float32 (float64 where it was) in [0, 1], inside the ball.
    fooled: (N,) bool: the model's response to `adv` is not the label. A sample that was wrong when untouched is fooled
        by its clean image, which is then `adv`.
    loss: (N,) alpha * L_task - beta * S_c at `adv`.
    passes: what it cost.
    nonfinite: (N,) int64, NaN and infinite elements seen in the sample's gradients. They count as 0 and as +-1 under a
        sign, and an L2 step stands still for them: such an attack says little about the model.
    """

    adv: Tensor
    fooled: Tensor
    loss: Tensor
    passes: Passes
    nonfinite: Tensor


class Best:
    """Keeps, per row, the adversarial image that counts: one that fools before one that does not, then by loss.

    It also adds up what the steps say of bad gradients: `nonfinite` (N,) int64.
    """

    def __init__(self, clean: Tensor) -> None:
        self.adv = clean.clone()
        self.fooled = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        self.loss = torch.full((len(clean),), float("-inf"), dtype=clean.dtype, device=clean.device)
        self.nonfinite = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)

    def offer(self, adv: Tensor, at: Evaluation, rows: Tensor) -> None:
        """`adv` (n, ...) was evaluated as `at`; `rows` (n,) says which rows of the batch these are."""
        fooled, loss = ~at.right, at.loss.to(self.loss)
        old_fooled, old_loss = self.fooled[rows], self.loss[rows]
        better = (fooled & ~old_fooled) | ((fooled == old_fooled) & (loss > old_loss))
        won = rows[better]
        self.adv[won] = adv[better]
        self.fooled[won] = fooled[better]
        self.loss[won] = loss[better]

    def result(self, passes: Passes) -> AttackResult:
        return AttackResult(self.adv, self.fooled, self.loss, passes, self.nonfinite)


def prepare(
    objective: Objective, clean: Tensor, threat: ThreatModel, sample_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked clean images (a float32 or float64 copy), eps per row (N,), and sample ids (N,) int64."""
    if len(clean) != len(objective):
        raise ValueError(f"there are {len(clean)} images for {len(objective)} texts; expected one image a text")
    check_pixels(clean)
    # A copy made outside inference mode, so that attacks also work on tensors that were created in it. Rounding may
    # have left a pixel at 1.0000001, which an untouched sample would otherwise give back.
    clean = clean.detach().to(torch.promote_types(clean.dtype, torch.float32)).clamp(0, 1).contiguous()
    if objective.layout is not None and len(clean):
        objective.layout.check(clean)
    if sample_ids is None:
        sample_ids = torch.arange(len(clean), device=clean.device)
    elif sample_ids.shape != (len(clean),):
        raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}; expected ({len(clean)},), one a sample")
    eps = torch.full((len(clean),), threat.eps, dtype=clean.dtype, device=clean.device)
    return clean, eps, sample_ids.to(clean.device)


def random_start(
    objective: Objective,
    adv: Tensor,
    clean: Tensor,
    eps: Tensor,
    sample_ids: Tensor,
    rows: Tensor,
    seed: int,
    norm: str,
) -> None:
    """`ops.random_start_` for `rows` (n,) of the batch, on the pixels that belong to them.

    Where samples differ in size, each gets the noise that it would get alone: in the L2 ball that depends on the number
    of pixels.
    """
    layout = objective.layout
    if layout is None or not layout.ragged:
        ops.random_start_(adv, clean, eps, sample_ids, seed, norm)
        return
    adv.copy_(clean)
    for i, row in enumerate(rows.tolist()):
        free = layout.free(row).expand_as(adv[i])
        own = clean[i][free][None]
        start = torch.empty_like(own)
        ops.random_start_(start, own, eps[i : i + 1], sample_ids[i : i + 1], seed, norm)
        adv[i][free] = start[0]


def geometry(objective: Objective, clean: Tensor) -> dict[str, Any]:
    """`mean`, `std` and `patches` of the steps for images like `clean`."""
    mean, std = objective.space.mean.to(clean), objective.space.std.to(clean)
    return {"mean": mean, "std": std, "patches": clean.shape[1] if clean.dim() == 5 else 1}
