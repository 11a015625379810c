"""State of image attacks: the checked inputs, the best adversarial images so far, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.victim import Evaluation, Passes, Victim
from cmai_fast.attacks.words import Words
from cmai_fast.pixels import check_pixels
from cmai_fast.threat import ThreatModel


@dataclass
class AttackResult:
    """Adversarial images of a batch.

    adv: like `clean`, (N, C, H, W) or units of a `Layout`, float32 (float64 if `clean` is) in [0, 1], inside the ball.
    fooled: (N,) bool: the model's response to `adv` is not the label, or if the victim is `targeted`, it is. A sample
        for which the clean image does so counts as fooled, and `adv` is that image.
    loss: (N,) the maximised loss, at `adv`.
    passes: the model passes that the attack took.
    nonfinite: (N,) int64, NaN and infinite elements in the sample's gradients. In a sign step, NaN counts as 0 and
        infinity as +-1; an L2 step does not move. Such an attack says little about the model.
    zero_gradients: (N,) int64, how many of the sample's gradients were 0 in every element, so that the attack had no
        direction. A defence that rounds its input looks robust for this reason. A single one may be legitimate (a
        loss of exactly 0); if all are 0, the attack says nothing about the model.
    model_input: `adv` in the model's input space, as the step computed it; None if the attack did not keep it.
    prompts: N texts in place of those that were typed; None if the attack does not change them.
    captions: N lists of texts in place of the texts that are right for each sample, in the order of its references; of
        dual encoders. None if the attack does not change them.
    words: N tensors (l, text_dim), what is added to the embeddings of each prompt's l tokens, template and image
        tokens included; None if the attack does not change them.
    details: what the attack says of each sample, N values by name, for the record.
    """

    adv: Tensor
    fooled: Tensor
    loss: Tensor
    passes: Passes
    nonfinite: Tensor
    zero_gradients: Tensor
    model_input: Tensor | None = None
    prompts: list[str] | None = None
    captions: list[list[str]] | None = None
    words: list[Tensor] | None = None
    details: dict[str, list[Any]] = field(default_factory=dict)


class Tally:
    """Counts per row of bad gradients of an attack: `nonfinite` and `zero_gradients` (N,) int64."""

    def __init__(self, victim: Victim, clean: Tensor) -> None:
        self.nonfinite = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        self.zero_gradients = torch.zeros_like(self.nonfinite)
        # A sample without an image has no gradient; it does not count as zero.
        self._images = None if victim.layout is None else victim.layout.real.flatten(1).any(1).to(clean.device)

    def add(self, grad: Tensor, nonfinite: Tensor, rows: Tensor | None) -> None:
        """Adds the gradient (n, ...) of `rows` (None: all) and the count of its non-finite elements per row."""
        # abs and amax are the cheapest reduction (CPU, 16 x 3 x 224 x 224: 3.0 ms, `any` 4.0, `count_nonzero` 7.6).
        zero = grad.flatten(1).abs().amax(1) == 0 if grad.numel() else torch.zeros_like(nonfinite, dtype=torch.bool)
        if self._images is not None:
            zero = zero & (self._images if rows is None else self._images[rows])
        if rows is None:
            self.nonfinite += nonfinite
            self.zero_gradients += zero
        else:
            self.nonfinite[rows] += nonfinite
            self.zero_gradients[rows] += zero


class Best:
    """Keeps the best adversarial image per row: one that fools before one that does not, then the highest loss."""

    def __init__(self, clean: Tensor, model_input: Tensor, words: Words | None = None) -> None:
        """`model_input`: `clean` in the model's input space. `words`: those under attack, kept with the images."""
        self._words = words
        self.adv, self.model_input = clean.clone(), model_input.clone()
        self.fooled = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        self.loss = torch.full((len(clean),), float("-inf"), dtype=clean.dtype, device=clean.device)

    def offer(self, adv: Tensor, model_input: Tensor, at: Evaluation, rows: Tensor) -> None:
        """Takes `adv` (n, ...) of `rows` (n,), its `model_input`, and the evaluation `at` it."""
        fooled, loss = ~at.right, at.loss.to(self.loss)
        old_fooled, old_loss = self.fooled[rows], self.loss[rows]
        better = (fooled & ~old_fooled) | ((fooled == old_fooled) & (loss > old_loss))
        won = rows[better]
        self.adv[won], self.model_input[won] = adv[better], model_input[better]
        self.fooled[won] = fooled[better]
        self.loss[won] = loss[better]
        if self._words is not None:
            self._words.note(won)

    def result(self, passes: Passes, tally: Tally) -> AttackResult:
        return AttackResult(
            self.adv, self.fooled, self.loss, passes, tally.nonfinite, tally.zero_gradients, self.model_input
        )


def prepare(
    victim: Victim, clean: Tensor, threat: ThreatModel, sample_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked clean images (a float32 or float64 copy), eps per row (N,), and sample ids (N,) int64."""
    if len(clean) != len(victim):
        raise ValueError(f"there are {len(clean)} images for {len(victim)} texts; expected one image per text")
    check_pixels(clean)
    # A copy made outside inference mode, so that attacks also work on tensors created in it. Rounding may have left a
    # pixel at 1.0000001, which would otherwise be returned for an unchanged sample.
    clean = clean.detach().to(torch.promote_types(clean.dtype, torch.float32)).clamp(0, 1).contiguous()
    if victim.layout is not None and len(clean):
        victim.layout.check(clean)
    if sample_ids is None:
        sample_ids = torch.arange(len(clean), device=clean.device)
    elif sample_ids.shape != (len(clean),):
        raise ValueError(f"sample_ids has shape {tuple(sample_ids.shape)}; expected ({len(clean)},), one per sample")
    eps = torch.full((len(clean),), threat.eps, dtype=clean.dtype, device=clean.device)
    return clean, eps, sample_ids.to(clean.device)


def random_start(
    victim: Victim,
    adv: Tensor,
    clean: Tensor,
    eps: Tensor,
    sample_ids: Tensor,
    rows: Tensor,
    seed: int,
    norm: str,
) -> None:
    """`ops.random_start_` for `rows` (n,) of the batch, without their padding; or the victim's own `origin`.

    If samples differ in size, each gets the noise it would get alone, which in the L2 ball depends on its size.
    """
    layout = victim.layout
    if victim.origin is not None:
        adv.copy_(victim.origin.to(adv)[rows])
        return
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


def geometry(victim: Victim, clean: Tensor) -> dict[str, Any]:
    """`mean`, `std` and `patches` of the steps for images like `clean`."""
    mean, std = victim.space.mean.to(clean), victim.space.std.to(clean)
    return {"mean": mean, "std": std, "patches": clean.shape[1] if clean.dim() == 5 else 1}
