"""Split batches: a share lam of the samples is adversarial and the rest clean, in one pass of the language side."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cmai_fast import ops
from cmai_fast.attacks import Passes, Victim
from cmai_fast.bridge import BatchImages
from cmai_fast.mbat.consistency import COUNTS, bad_gradients
from cmai_fast.mbat.inner import InnerResult, bridge_gradient, needs_gradient
from cmai_fast.mbat.memory import GradientMemory
from cmai_fast.mbat.parts import WEIGHTS, Part, View, take
from cmai_fast.mbat.step import StepTrainer

_DRAW = 1_000_003  # between the seeds of attacks and of draws in a step


def adversarial_rows(sample_ids: Tensor, share: float, seed: int) -> Tensor:
    """(N,) bool: each sample with probability `share`, by a hash of (seed, sample id), independently of the others."""
    noise = torch.zeros(len(sample_ids), 1, device=sample_ids.device)
    ops.random_start_(noise, torch.zeros_like(noise), torch.ones_like(noise[:, 0]), sample_ids, seed, "linf", -1.0, 1.0)
    return (noise[:, 0] + 1) / 2 < share


class SplitTrainer(StepTrainer):
    """The step of `MBATConfig.split`.

    With independent draws z_i, 1 with probability lam, the loss is sum_i w_i * L(x_i + z_i * delta_i). Over the draws
    its mean, and that of its gradient, are those of sum_i w_i * ((1 - lam) * L(x_i) + lam * L(x_i + delta_i)), the loss
    of a whole step, in which each sample is there twice. A draw is a hash of (seed, step, sample id): it depends
    neither on the batch nor on its parts.

    What is attacked is the adversarial samples alone. For the bridge solver they first run clean, without gradients of
    weights, for p. The language side thus runs forward and backward 1 + lam times, in a whole step twice.

    `loss_clean` and `loss_adv` are estimates from one draw, with the mean of those of a whole step: their sums over
    the samples that were drawn, divided by 1 - lam and lam.

    With `split_memory` the gradient that a step leaves at h_v of each sample, clean or adversarial, is its p when it is
    attacked next, and the language side runs once.
    """

    _left: list[tuple[list[int], list[Tensor]]]  # by this step, for the memory

    def _step(self, inputs: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], Tensor]:
        self._left = []
        result = super()._step(inputs, size)
        if self.args.split_memory:
            memory = self._remembered()
            for ids, gradients in self._left:  # now that no part of the step reads it, and it will not be repeated
                memory.keep(ids, gradients)
        self._left = []
        return result

    def _remembered(self) -> GradientMemory:
        if self._memory is None:
            self._memory = GradientMemory(self.args.split_memory)
        self._memory.most = self.args.split_memory
        return self._memory

    @property
    def draw_seed(self) -> int:
        """Of `adversarial_rows` in this step."""
        return self._attack_seed + _DRAW

    def _language_side(self, inputs: dict[str, Tensor], *, keep: bool) -> Part:
        if not self.args.split or "pixel_values" not in inputs:
            return super()._language_side(inputs, keep=keep)
        ids, (image, text) = inputs["sample_ids"], self.bridge.inputs(inputs)
        attacked = adversarial_rows(ids, self.lam, self.draw_seed)
        values, sums = self._mixed(inputs, attacked)
        view = View.of(lambda: self.bridge.encode_image(values, **image), self.args.device, keep=keep)
        losses = self._sample_losses(view.leaf, text)
        weighted = inputs[WEIGHTS].to(losses) * losses
        self._count(full_forward=1, full_backward=1)
        self.accelerator.backward(self._share * weighted.sum())
        if self.args.split_memory:
            self._leave(ids, view.leaf, inputs[WEIGHTS], self.bridge.image_tokens(text))
        by_branch = {"loss_clean": (~attacked, 1 - self.lam), "loss_adv": (attacked, self.lam)}
        sums |= {k: weighted.detach()[rows].sum() / share for k, (rows, share) in by_branch.items() if share}
        return Part(text, [view], None, None, sums)

    def _leave(self, ids: Tensor, leaf: Tensor, weights: Tensor, tokens: Tensor | None) -> None:
        """Takes p of each sample from the gradient at h_v, where the sample counts at all."""
        assert leaf.grad is not None
        rows = weights.nonzero().squeeze(1)
        p = leaf.grad[rows].float() / (self._share * weights[rows].float())[:, None, None]
        own = [leaf.shape[1]] * len(rows) if tokens is None else tokens[rows].tolist()
        self._left.append((ids[rows].tolist(), [each[:n] for each, n in zip(p, own, strict=True)]))

    def _mixed(self, inputs: dict[str, Tensor], attacked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`pixel_values` with adversarial images in the rows `attacked` (N,), and the `COUNTS` of their attack."""
        values, rows = inputs["pixel_values"], attacked.nonzero().squeeze(1)
        if not len(rows):
            return values, dict.fromkeys(COUNTS, torch.zeros((), device=values.device))
        images = BatchImages(self.bridge, self.space, inputs)
        chosen = take(images, inputs, rows)
        before, self.passes = self.passes, Passes()
        victim, result = self._attacked(chosen)
        self.passes = before + self.passes.of(len(rows) / len(attacked))  # a pass is of the whole batch
        adversarial, layout = result.model_input.to(values.dtype), images.layout
        if layout is None:
            return values.index_copy(0, rows, adversarial), bad_gradients(result)
        units = layout.split(layout.unpack(values))
        for row, own in zip(rows.tolist(), victim.split(adversarial), strict=True):
            units[row] = own
        return layout.pack(layout.join(units)), bad_gradients(result)

    def _attacked(self, inputs: dict[str, Tensor]) -> tuple[Victim, InnerResult]:
        """These samples, and their adversarial images."""
        args, text, scores = self.args, self.bridge.inputs(inputs)[1], self.beta > 0
        own = self._read_texts(inputs, text)[0] if scores else None
        victim = self._victim(inputs, own, self._read_statements(inputs) if scores else None, scores=scores)
        p = None
        if args.inner == "bridge" and needs_gradient(args.inner_steps, args.refreshes):
            p = self._gradients(victim, inputs)
        return victim, self._attack(victim, inputs["sample_ids"], p)

    def _gradients(self, victim: Victim, inputs: dict[str, Tensor]) -> Tensor:
        """p (n, T, D) of the samples of `victim`: from the memory, and for those that are not there by a clean pass."""
        ids = inputs["sample_ids"].tolist()
        known = [self._remembered().find(i) for i in ids] if self.args.split_memory else [None] * len(ids)
        unknown = torch.tensor([row for row, p in enumerate(known) if p is None], device=inputs["labels"].device)
        if len(unknown):
            others = victim
            if len(unknown) < len(ids):
                others = Victim(self.bridge, self.space, take(victim, inputs, unknown))
            fresh = bridge_gradient(others)
            self.passes = self.passes + Passes(full_forward=1, full_backward=1).of(len(unknown) / len(ids))
            if others is victim:
                return fresh
            tokens = others.image_tokens()
            own = [fresh.shape[1]] * len(fresh) if tokens is None else tokens.tolist()
            for row, p, n in zip(unknown.tolist(), fresh, own, strict=True):
                known[row] = p[:n]
        found = [p.to(self.args.device, self.bridge.model.dtype) for p in known if p is not None]
        return pad_sequence(found, batch_first=True)
