"""Gradient estimators, which turn a loss into a gradient at the pixels: exact, stale bridge, mean over transforms.

Each serves every gradient attack (`gradient=`) and the inner problem of MBAT. Losses are summed over the batch, never
averaged, so a row's gradient is its own whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.attacks.losses import Loss, Weighted, cross_entropy
from cmai_fast.attacks.victim import Evaluation, Victim
from cmai_fast.bridge.backward import differentiate, unit
from cmai_fast.registry import Registry

# (images in the model's input space (n, ...), their rows of the batch (None: all), step number) -> (gradient like the
# images, the evaluation at them or None if the language model did not run).
Estimate = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Evaluation | None]]


@dataclass
class Course:
    """One ascent of an attack, for which gradients are estimated.

    clean: (N, ...) the whole batch in [0, 1]; sample_ids: (N,); steps: the number of gradients.
    """

    victim: Victim
    loss: Loss
    clean: Tensor
    sample_ids: Tensor
    steps: int
    seed: int = 0


class Gradient(Protocol):
    """The settings of an estimator. `start` makes the estimator of one ascent, which may keep state between steps."""

    def start(self, course: Course) -> Estimate: ...


GRADIENTS: Registry[Gradient] = Registry("gradient", "cmai_fast.attacks.gradients")


def gradient_of(named: str | Gradient | None) -> Gradient:
    """The gradient of this name, the object itself, or the exact one."""
    if named is None:
        return Exact()
    return GRADIENTS[named] if isinstance(named, str) else named


def exact_gradient(
    victim: Victim, model_input: Tensor, rows: Tensor | None = None, loss: Loss = cross_entropy, judge: bool = True
) -> tuple[Tensor, Evaluation | None]:
    """d loss / d model_input, like `model_input`, and the evaluation at that point, detached; None unless `judge`.

    A loss that does not use the language side is differentiated through the vision side alone; without `judge` the
    language side does not run at all.
    """
    with torch.enable_grad():
        leaf = model_input.detach().clone().requires_grad_()
        features = victim.encode(leaf, rows)
        outputs, before = victim.outputs(features, rows), victim.passes.full_forward
        losses = loss(features, outputs, victim, rows)
        grad = differentiate(victim.bridge.model, losses, leaf)
    if victim.passes.full_forward > before:
        victim.ran(rows, backward=True)
    else:
        victim.passes.vision_backward += 1
    if not judge:
        victim.passes.vision_forward += victim.passes.full_forward == before
        return grad, None
    with torch.no_grad():
        return grad, Evaluation(losses.detach(), outputs.right)


@dataclass(frozen=True)
class Exact:
    """Backpropagation through the whole model, or what of it the loss uses.

    Args:
        judge: False leaves out whether a sample is fooled, so that a loss of the image side costs no language model.
    """

    judge: bool = True

    def start(self, course: Course) -> Estimate:
        victim, loss = course.victim, course.loss
        return lambda model_input, rows, step: exact_gradient(victim, model_input, rows, loss, self.judge)


def refresh_steps(steps: int, refreshes: int) -> set[int]:
    """Steps at which p is refreshed: R points that divide K steps into R + 1 equal parts; with R = K, every step."""
    if not 0 <= refreshes <= steps:
        raise ValueError(f"refreshes is {refreshes}; expected 0 to {steps}, the number of steps")
    return {i * steps // (refreshes + 1) for i in range(1, refreshes + 1)} if refreshes < steps else set(range(steps))


@dataclass(frozen=True)
class StaleBridge:
    """A frozen co-state p = d(alpha * L)/d h_v, refreshed `refreshes` times by a pass through the whole model.

    Between refreshes, <p, h_v(x + delta)> is maximised through E_v, whose gradient is exact: only the language model is
    linearised. S_c of a `Weighted` loss depends on the vision side only, and its gradient is always that of the image.

    Whether a sample is fooled is known only at refreshes and at the end.

    Args:
        refreshes: R. R = steps is the exact gradient.
        co_state: p (N, T, D) of each sample's L at its clean image, if the caller has it; None: computed at the clean
            images, at the cost of one full pass (unless step 0 refreshes it anyway).
        staleness: a list to which cos(stale p, fresh p) (n,) of each refresh is appended.
    """

    refreshes: int = 1
    co_state: Tensor | None = None
    staleness: list[Tensor] | None = None

    def start(self, course: Course) -> Estimate:
        victim = course.victim
        loss = course.loss if isinstance(course.loss, Weighted) else Weighted(loss=course.loss)
        renew = refresh_steps(course.steps, self.refreshes)
        p = None if self.co_state is None else loss.alpha * self.co_state.detach()
        if p is None and 0 not in renew:
            p, _, _ = refresh(victim, victim.space.to_model(course.clean), None, loss)

        def estimate(model_input: Tensor, rows: Tensor | None, step: int) -> tuple[Tensor, Evaluation | None]:
            nonlocal p
            stale = p if p is None or rows is None else p[rows]
            if step not in renew:
                assert stale is not None
                return vision_gradient(victim, model_input, stale, rows, loss), None
            fresh, grad, at = refresh(victim, model_input, rows, loss)
            if stale is not None and self.staleness is not None:
                self.staleness.append(torch.cosine_similarity(stale.flatten(1), fresh.flatten(1)))
            if rows is None:
                p = fresh
            else:
                p = fresh.new_zeros(len(victim), *fresh.shape[1:]) if p is None else p
                p[rows] = fresh
            return grad, at

        return estimate


def refresh(
    victim: Victim, model_input: Tensor, rows: Tensor | None, loss: Weighted
) -> tuple[Tensor, Tensor, Evaluation]:
    """A full pass at `model_input`: p = d(alpha * L)/d h_v, the exact gradient at the pixels, and the evaluation."""
    with torch.enable_grad():
        leaf = model_input.detach().clone().requires_grad_()
        features = victim.encode(leaf, rows)
        outputs = victim.outputs(features, rows)
        losses = loss.loss(features, outputs, victim, rows)
        # Stops at the bridge, which keeps the graph of the vision side for the second half.
        p = loss.alpha * differentiate(victim.bridge.model, losses, features)
        victim.ran(rows, backward=True)
        way, score = loss.direction(p, features, victim, rows)
        (grad,) = torch.autograd.grad((way * features).sum(), leaf)
    total = loss.alpha * losses.detach()
    with torch.no_grad():
        return p, grad, Evaluation(total if score is None else total - loss.beta * score, outputs.right)


def vision_gradient(victim: Victim, model_input: Tensor, p: Tensor, rows: Tensor | None, loss: Weighted) -> Tensor:
    """d/dx of <way, h_v(x)> through E_v alone, where `way` is the direction of `Weighted.direction` for a p
    (n, T, D) of an earlier image, and S_c of this one.

    The length of p says how sure the model was, not in which direction to go: alone, it does not count.
    """
    p = p if loss.beta else unit(p)
    with torch.enable_grad():
        leaf = model_input.detach().clone().requires_grad_()
        features = victim.encode(leaf, rows)
        victim.passes.vision_forward += 1
        victim.passes.vision_backward += 1
        way, _ = loss.direction(p, features, victim, rows)
        return torch.autograd.grad((way * features).sum(), leaf)[0]


@dataclass(frozen=True)
class MeanOverTransforms:
    """The mean gradient over `draws` random transforms of the image (Athalye et al. 2018, expectation over
    transformations), for a victim that changes its input at random, or an attack that has to survive such changes.

    The evaluation is at the untransformed image and takes one more forward pass.

    Args:
        transform: (pixels, noise) to pixels, differentiable, (n, ...) in [0, 1]. `noise` is like pixels, uniform in
            (-1, 1), and depends on (seed, sample id, step, draw) only, so a result does not depend on the batch.
        draws: transforms per step.
    """

    transform: Callable[[Tensor, Tensor], Tensor]
    draws: int = 8

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; expected at least 1")

    def start(self, course: Course) -> Estimate:
        victim, loss = course.victim, course.loss

        def estimate(model_input: Tensor, rows: Tensor | None, step: int) -> tuple[Tensor, Evaluation]:
            with torch.no_grad():
                at = victim(model_input, rows, loss)
            total = torch.zeros_like(model_input)
            ids = course.sample_ids if rows is None else course.sample_ids[rows]
            for draw in range(self.draws):
                noise = _noise(model_input, ids, course.seed + 7_368_787 * (step * self.draws + draw + 1))
                moved = lambda pixels, noise=noise: self.transform(pixels, noise)  # noqa: E731
                total += gradient_through(victim, model_input, moved, rows, loss)
            return total / self.draws, at

        return estimate


def gradient_through(
    victim: Victim, model_input: Tensor, transform: Callable[[Tensor], Tensor], rows: Tensor | None, loss: Loss
) -> Tensor:
    """d loss / d model_input, like `model_input`, at the images after a differentiable change of their pixels."""
    with torch.enable_grad():
        leaf = model_input.detach().clone().requires_grad_()
        mean, std = victim.space.like(leaf)
        features = victim.encode(victim.space.to_model(transform(leaf * std + mean)), rows)
        outputs, before = victim.outputs(features, rows), victim.passes.full_forward
        grad = differentiate(victim.bridge.model, loss(features, outputs, victim, rows), leaf)
    if victim.passes.full_forward > before:
        victim.ran(rows, backward=True)
    else:
        victim.passes.vision_forward += 1
        victim.passes.vision_backward += 1
    return grad


def _noise(like: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
    """Uniform in (-1, 1), a hash of (seed, sample id, element)."""
    noise = torch.empty_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
    one = torch.ones(len(like), dtype=noise.dtype, device=like.device)
    ops.random_start_(noise, torch.zeros_like(noise), one, sample_ids, seed, "linf", -1.0, 1.0)
    return noise


GRADIENTS.add("exact", Exact())
GRADIENTS.add("bridge", StaleBridge())
