"""ARM in a training run: where it is on, what it moves, and its update after each optimiser step."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import Trainer

from cmai_fast.arm import ARMSchedule
from cmai_fast.arm.schedule import Range
from cmai_fast.cmcv.heads import ImageSide
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.mbat import ranks
from cmai_fast.mbat.config import MBATConfig

# Optimiser steps that new heads learn before ARM uses their S_c, as many as `cmai-fast immunize` fits heads for: until
# then a low S_c says nothing about an image.
HEADS_LEARN = 300

_logger = logging.getLogger(__name__)


class AdaptiveTrainer(Trainer):
    """A `Trainer` with ARM: `beta`, `eps` and `lam` are those of the next step.

    ARM needs heads that know what is consistent: given ones, or, after `HEADS_LEARN` steps, those that this run trains
    (gamma above 0). Its thresholds come from S_c of the clean images of the same steps. They are of the same samples
    and true answers as the adversarial branch, cost nothing, exist in every run, and follow the heads while these
    learn. A threshold of the calibration split is of the model's own answers and of the heads before training, and a
    plain trainer has no such split.
    """

    args: MBATConfig
    heads: ImageSide | None
    verifier: Verifier | None
    _heads_given: bool
    _heads_optimizer: torch.optim.Optimizer | None
    _schedule: ARMSchedule | None = None
    _scores: list[tuple[Tensor, Tensor]]  # adversarial and clean S_c of the current step's micro-batches
    _arm_logged = False

    def _check_arm(self, args: MBATConfig) -> None:
        """Raises ValueError for an ARM that is asked for and has no trained heads."""
        trained = self._has_trained_heads(args)
        if args.arm and args.modality == "text":
            raise ValueError(
                "arm is True and modality 'text': ARM acts on S_c of adversarial images, of which there are none. Set "
                "modality to 'both', or leave arm out"
            )
        if args.arm and not trained:
            raise ValueError(
                "arm is True, and there are no trained consistency heads to measure S_c with: heads is None and gamma "
                f"{args.gamma}. Give trained heads (heads=ConsistencyHeads.from_pretrained(folder)[0]), set gamma "
                "above 0 to train them in this run, or leave arm out"
            )
        if args.arm is None and not trained and not self._arm_logged:
            self._arm_logged = True
            _logger.info("ARM is off: there are no trained consistency heads (heads is None and gamma 0)")

    def _has_trained_heads(self, args: MBATConfig) -> bool:
        if self.heads is None:
            return False
        return self._heads_given or args.gamma > 0 or self._heads_optimizer is not None

    @property
    def schedule(self) -> ARMSchedule | None:
        """ARM with the current settings; None if it is off."""
        args = self.args
        if args.arm is False or args.modality == "text" or not self._has_trained_heads(args):
            return None
        ranges = {
            "beta": Range(args.beta, args.beta_max, args.beta_step),
            "eps": Range(args.eps, args.eps_max, args.eps_step),
            "lam": Range(args.lam, args.lam_max, args.lam_step),
        }
        settings = ranges, args.tau_train, args.variance_max, 0 if self._heads_given else HEADS_LEARN
        if self._schedule is None:
            self._schedule = ARMSchedule(*settings)
        self._schedule.follow(*settings)
        return self._schedule

    @property
    def beta(self) -> float:
        """The weight of S_c in the next inner problem."""
        return self._now("beta")

    @property
    def eps(self) -> float:
        """The radius of the next inner problem, before `eps_warmup`."""
        return self._now("eps")

    @property
    def lam(self) -> float:
        """The weight of the adversarial branch in the next step."""
        return self._now("lam")

    def _now(self, name: str) -> float:
        schedule = self.schedule
        return getattr(self.args, name) if schedule is None else schedule.value(name)

    def _adapt(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes S_c of a micro-batch. After the last of an optimiser step ARM is updated by all of them, of all
        processes; returns what is logged of it then: the settings of this step, and what ARM has measured."""
        schedule = self.schedule
        if schedule is None:
            self._scores = []
            return {}
        if "s_c_adv" in parts:
            self._scores.append((parts["s_c_adv"], parts["s_c_clean"]))
        if not self.accelerator.sync_gradients or not self._scores:
            return {}
        adversarial, clean = (ranks.gather(torch.cat(scores)) for scores in zip(*self._scores, strict=True))
        self._scores = []
        values: dict[str, float | None] = {name: schedule.value(name) for name in schedule.ranges}
        values["arm_level"] = schedule.level
        schedule.update(adversarial, clean)
        values |= {"arm_mean": schedule.mean, "arm_variance": schedule.variance, "tau_train": schedule.tau_train}
        return {name: torch.tensor(value) for name, value in values.items() if value is not None}
