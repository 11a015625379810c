"""Adversarial training with an attack of one forward and backward pass, or of none beside those of the training, beside
`fgsm`: trainers for rows of `frontier.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmai_fast.attacks.ascent import Ascent, ascend
from cmai_fast.attacks.gradients import Course, Exact
from cmai_fast.attacks.losses import weighted
from cmai_fast.attacks.state import Tally, prepare
from cmai_fast.attacks.victim import Victim
from cmai_fast.mbat import MBATTrainer
from cmai_fast.mbat.inner import InnerResult
from cmai_fast.mbat.parts import WEIGHTS, Part, View


class NFGSM(MBATTrainer):
    """N-FGSM (de Jorge et al. 2022): one step of eps from noise of 2 eps, which is not brought back into the ball."""

    def _attack(self, victim: Victim, sample_ids: Tensor, p: Tensor | None) -> InnerResult:
        ball, clean = self._ball, victim.pixels()
        noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(self._attack_seed)).to(clean)
        start = (clean + 2 * ball.eps * (2 * noise - 1)).clamp(0, 1)
        with victim.attack_mode():
            start, eps, ids = prepare(victim, start, ball, sample_ids)
            estimate = Exact().start(Course(victim, weighted(1.0, 0.0), start, ids, 1, self._attack_seed))
            at, tally = Ascent.begin(victim, start, eps, ball.norm), Tally(victim, start)
            ascend(victim, at, estimate, [ball.eps], ball.norm, tally)
        self.passes = self.passes + victim.passes
        return InnerResult(at.adv, at.model_input, victim.passes, [], tally.nonfinite, tally.zero_gradients)


class Free(MBATTrainer):
    """Free adversarial training (Shafahi et al. 2019): each batch is trained on `replays` times, and the backward pass
    of each time also gives the next step of the perturbation, which goes on from batch to batch."""

    replays = 4
    _batch: dict[str, Tensor] | None = None
    _delta: Tensor | None = None

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        if self._batch is None or self.state.global_step % self.replays == 0:
            self._batch = inputs
        loss = super().training_step(model, dict(self._batch), num_items_in_batch)
        x, eps = self._seen, self._ball.eps
        assert x.grad is not None and self._delta is not None
        self._delta = (self._delta + eps * x.grad.sign()).clamp(-eps, eps)
        return loss

    def _language_side(self, inputs: dict[str, Tensor], *, keep: bool) -> Part:
        _, text = self.bridge.inputs(inputs)
        victim = self._images(inputs)
        clean = victim.pixels()
        if self._delta is None:
            self._delta = torch.zeros_like(clean)
        self._seen = victim.space.to_model((clean + self._delta).clamp(0, 1)).requires_grad_()
        view = View.of(lambda: victim.encode(self._seen), self.args.device, keep=keep)
        return Part(text, [view], None, None, self._adversarial_branch(view.leaf, text, inputs[WEIGHTS], None))
