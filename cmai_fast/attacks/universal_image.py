"""One image in place of every picture, towards given answers on any prompt and several models (arXiv 2502.07987)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.losses import Loss, loss_of
from cmai_fast.attacks.state import AttackResult
from cmai_fast.attacks.universal import applied, attacked, check_counts, order, pictures_of
from cmai_fast.attacks.victim import Victim
from cmai_fast.bridge.backward import differentiate
from cmai_fast.threat import ThreatModel

_ROUNDING = 1 / (255 * 12**0.5)  # the standard deviation of the error of rounding to 8 bits


def universal_image(
    batches: Sequence[Sequence[Victim]],
    threat: ThreatModel,
    *,
    steps: int,
    seed: int = 0,
    loss: str | Loss | None = None,
    rate: float = 0.01,
    images: Sequence[Tensor] | None = None,
) -> Tensor:
    """gamma * tanh(z_1), shape (C, H, W), gamma being the radius of the L_inf ball.

    The image is z = clip(z_0 + gamma * tanh(z_1) + xi, 0, 1), z_0 being the batch's own (grey for the threat `blank`),
    xi noise of the size of the rounding to 8 bits. AdamW minimises over z_1 the loss towards the victims' labels, with
    one batch of prompts per step, summed over the targets and models of the batch.

    Args:
        batches: targeted victims of each batch of prompts: one for each target and model, all with the same images.
            Those of the same model, `bridge.model`, share its passes of the vision side.
        images: (N, C, H, W) of each batch in [0, 1]; None: the victims' own.
        others: as of the attack.

    Raises:
        ValueError: no batch, images of several sizes, or a victim that is not targeted.
    """
    if not all(victim.targeted for victims in batches for victim in victims):
        raise ValueError(
            "universal-image moves towards the labels of its victims, and one is not `targeted`; make their labels the "
            "answers that are wanted, and set victim.targeted"
        )
    maximised, generator = loss_of(loss), torch.Generator().manual_seed(seed)
    with attacked(batches):
        images = pictures_of(batches, images, "universal-image")
        z = torch.zeros_like(images[0][0])
        optimizer = torch.optim.AdamW([z], lr=rate)
        for place in order(len(batches), steps, seed):
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z) * _ROUNDING
            bend = torch.tanh(z)
            moved = images[place] + threat.eps * bend + noise
            image = moved.clamp(0, 1).requires_grad_()
            grad = torch.zeros_like(image)
            for victims in _by_model(batches[place]):
                features = victims[0].encode(victims[0].space.to_model(image))
                outputs = [victim.outputs(features) for victim in victims]
                losses = [maximised(features, out, v, None) for out, v in zip(outputs, victims, strict=True)]
                grad += differentiate(victims[0].bridge.model, torch.stack(losses).sum(0), image)
                for victim in victims:
                    victim.ran(None, backward=True)
            grad = grad.nan_to_num(0.0, 0.0, 0.0).masked_fill((moved < 0) | (moved > 1), 0.0)
            z.grad = -grad.mean(0) * threat.eps * (1 - bend.square())
            optimizer.step()
        return threat.eps * torch.tanh(z)


def _by_model(victims: Sequence[Victim]) -> list[list[Victim]]:
    found: dict[int, list[Victim]] = {}
    for victim in victims:
        found.setdefault(id(victim.bridge.model), []).append(victim)
    return list(found.values())


def _refuse(rate: float = 0.0, samples: int = 1, batch: int = 1) -> None:
    if not 0 <= rate < float("inf"):
        raise ValueError(f"universal-image: rate is {rate}; expected a finite number of at least 0")
    check_counts("universal-image", samples, batch)


@attack(
    "universal-image", label="Universal image", steps=2000, threats=("linf",), aimed=True, refuse=_refuse,
    fit=universal_image,
)  # fmt: skip
def _applied(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None = None,
    rate: float = 0.01,
    samples: int = 256,
    batch: int = 8,
) -> AttackResult:
    """`universal_image` in place of every image: `victim.common`, or one that is found on this very batch.

    Args:
        rate: the learning rate of AdamW.
        samples, batch: how many samples of the training split an evaluation takes prompts from, and how many of them at
            a time.
    """
    if victim.common is None:
        victim.common = universal_image(
            [[victim]], threat, steps=steps, seed=seed, loss=loss, rate=rate, images=[clean]
        )
    return applied(victim, clean, threat, sample_ids, loss)
