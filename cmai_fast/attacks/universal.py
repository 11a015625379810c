"""One perturbation for all images of a data set (Moosavi-Dezfooli et al., 2017; by gradients, Shafahi et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from cmai_fast.attacks.attack import attack
from cmai_fast.attacks.gradients import Course, Gradient, gradient_of
from cmai_fast.attacks.losses import Loss, loss_of
from cmai_fast.attacks.state import AttackResult, Tally, prepare
from cmai_fast.attacks.victim import Victim
from cmai_fast.threat import ThreatModel


def universal_perturbation(
    batches: Sequence[Sequence[Victim]],
    threat: ThreatModel,
    *,
    steps: int,
    seed: int = 0,
    loss: str | Loss | None = None,
    gradient: str | Gradient | None = None,
    clip: float = 9.0,
    step_size: float | None = None,
    decay: float = 0.9,
    images: Sequence[Tensor] | None = None,
) -> Tensor:
    """delta (C, H, W) in the ball, which ascends the mean over samples of min(L(clip(x + delta, 0, 1)), `clip`).

    A step takes the gradient at one batch, in an order drawn with `seed`. Models are restored afterwards.

    Args:
        batches: victims of each batch; those of one batch have the same images (several models, several targets), and
            their gradients are summed.
        steps: gradient steps in all.
        images: (N, C, H, W) of each batch in [0, 1]; None: the victims' own.
        others: as of `universal`.

    Raises:
        ValueError: no batch, or images of several sizes.
    """
    maximised, estimator = loss_of(loss or "margin"), gradient_of(gradient)
    with attacked(batches):
        images = pictures_of(batches, images, "universal")
        delta, velocity = torch.zeros_like(images[0][0]), torch.zeros_like(images[0][0])
        visits = -(-steps // len(batches))
        estimates = [
            [estimator.start(Course(v, maximised, clean, torch.arange(len(v)), visits, seed)) for v in victims]
            for victims, clean in zip(batches, images, strict=True)
        ]
        for step, place in enumerate(order(len(batches), steps, seed)):
            clean = images[place]
            moved = clean + delta
            total = torch.zeros_like(delta)
            for victim, estimate in zip(batches[place], estimates[place], strict=True):
                grad, found = estimate(victim.space.to_model(moved.clamp(0, 1)), None, step // len(batches))
                grad = (grad / victim.space.like(grad)[1]).nan_to_num(0.0, 0.0, 0.0)
                # A sample that is far gone, or a pixel at the edge of the box, would get nothing of it.
                grad = grad.masked_fill((moved < 0) | (moved > 1), 0.0)
                if found is not None:
                    grad = grad.masked_fill((found.loss >= clip).view(-1, 1, 1, 1), 0.0)
                total += grad.to(total).sum(0)
            size = 1 - step / steps
            if threat.norm == "linf":
                velocity = decay * velocity + total / total.abs().mean().clamp_min(1e-30)
                size *= threat.eps / 2 if step_size is None else step_size
                delta = (delta + size * velocity.sign()).clamp(-threat.eps, threat.eps)
            else:
                velocity = decay * velocity + total / total.norm().clamp_min(1e-30)
                size *= threat.eps / 2 if step_size is None else step_size
                delta = delta + size * velocity / velocity.norm().clamp_min(1e-30)
                delta = delta * (threat.eps / delta.norm().clamp_min(1e-30)).clamp_max(1.0)
    return delta


def _refuse(
    clip: float = 1.0,
    step_size: float | None = None,
    decay: float = 0.0,
    samples: int = 1,
    batch: int = 1,
) -> None:
    for name, value in (("clip", clip), ("step_size", step_size), ("decay", decay)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"universal: {name} is {value}; expected a finite number of at least 0")
    check_counts("universal", samples, batch)


@attack("universal", label="Universal", steps=200, refuse=_refuse, fit=universal_perturbation)
def universal(
    victim: Victim,
    clean: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    sample_ids: Tensor | None,
    loss: str | Loss | None = None,
    gradient: str | Gradient | None = None,
    clip: float = 9.0,
    step_size: float | None = None,
    decay: float = 0.9,
    samples: int = 256,
    batch: int = 32,
) -> AttackResult:
    """Adds one delta to every image: `victim.common`, or one that is found on this very batch.

    Args:
        steps: of the search, in all.
        loss: None is the margin: on `easyvqa-llava` at 16/255 (100 steps, 200 questions) it left 90% right, the
            cross-entropy 94%, random noise 98%. The cross-entropy of a sure model saturates.
        clip: a sample whose loss is above it is left alone, so that no sample dominates (Shafahi et al., section 3,
            beta).
        step_size: of the first step; they decrease linearly to 0. None: eps / 2.
        decay: momentum: a batch shows only a part of the data.
        samples, batch: how many samples of the training split an evaluation searches on, and how many of them at a
            time.
    """
    if victim.common is None:
        victim.common = universal_perturbation(
            [[victim]], threat, steps=steps, seed=seed, loss=loss, gradient=gradient, clip=clip, step_size=step_size,
            decay=decay, images=[clean],
        )  # fmt: skip
    return applied(victim, clean, threat, sample_ids, loss or "margin")


def applied(
    victim: Victim, clean: Tensor, threat: ThreatModel, sample_ids: Tensor | None, loss: str | Loss | None
) -> AttackResult:
    """`victim.common` added to every image, evaluated there."""
    assert victim.common is not None
    with victim.counted(), victim.attack_mode(), torch.no_grad():
        clean, _, _ = prepare(victim, clean, threat, sample_ids)
        tally, common = Tally(victim, clean), victim.common.to(clean)
        if clean.shape[1:] != common.shape:
            raise ValueError(
                f"the perturbation was found on images of {tuple(common.shape)}, and these are "
                f"{tuple(clean.shape[1:])}; expected images of one size"
            )
        adv = (clean + common).clamp(0, 1)
        model_input = victim.space.to_model(adv)
        at = victim(model_input, None, loss_of(loss))
        return AttackResult(adv, ~at.right, at.loss, victim.passes, tally.nonfinite, tally.zero_gradients, model_input)


def pictures_of(batches: Sequence[Sequence[Victim]], images: Sequence[Tensor] | None, name: str) -> list[Tensor]:
    """The clean images (N, C, H, W) of each batch, at least float32.

    Raises:
        ValueError: no batch, images of several sizes, or a model that reads a sample in several pieces.
    """
    if not batches:
        raise ValueError(f"{name} has no samples to search on; expected at least one batch")
    found = [victims[0].pixels() for victims in batches] if images is None else list(images)
    shapes = {tuple(several.shape[1:]) for several in found}
    if len(shapes) > 1 or found[0].dim() != 4:
        reader = type(batches[0][0].bridge.model).__name__
        raise ValueError(
            f"{name} adds the same to every image, and {reader} reads samples of shapes {sorted(shapes)}; expected one "
            "image per sample, all of one size. Models that read tiles or patches take it before the processor, from "
            "pictures of one size (--threat upload)"
        )
    return [several.detach().to(torch.promote_types(several.dtype, torch.float32)).clamp(0, 1) for several in found]


@contextmanager
def attacked(batches: Sequence[Sequence[Victim]]) -> Iterator[None]:
    """Every model of these victims in attack mode, once."""
    first = {id(victim.bridge.model): victim for victims in batches for victim in victims}
    with ExitStack() as modes:
        for victim in first.values():
            modes.enter_context(victim.attack_mode())
        yield


def order(batches: int, steps: int, seed: int) -> Iterator[int]:
    """The batch of each step: all of them in turn, each round in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        yield from torch.randperm(batches, generator=generator).tolist()[:steps]
        steps -= batches


def check_counts(name: str, samples: int, batch: int) -> None:
    """Raises ValueError for numbers of samples below 1."""
    if samples < 1 or batch < 1:
        raise ValueError(f"{name}: samples is {samples} and batch is {batch}; expected at least 1 of each")
