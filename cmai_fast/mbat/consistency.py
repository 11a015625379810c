"""S_c in a training step: what is read for it, its loss on clean and adversarial images, and steps on S_c alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmai_fast.attacks import Passes, Victim
from cmai_fast.bridge import ModelBridge, frozen
from cmai_fast.bridge.graphs import EncoderGraphs
from cmai_fast.cmcv import ConsistencyHeads, contrastive_loss, packed_text, text_groups
from cmai_fast.cmcv.verifier import Texts, Verifier
from cmai_fast.data.collate import negative_texts
from cmai_fast.mbat import ranks
from cmai_fast.mbat.checkpoints import CheckpointedTrainer
from cmai_fast.mbat.drift import Original, squared_distance
from cmai_fast.mbat.inner import InnerResult
from cmai_fast.mbat.parts import Part, View
from cmai_fast.mbat.verifier import INNER_STEPS, inconsistent
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel

COUNTS = ("nonfinite_gradients", "zero_gradients")


def bad_gradients(result: InnerResult) -> dict[str, Tensor]:
    """The `COUNTS` of an attack on a batch, 0-d."""
    counts = (result.nonfinite.sum().float(), result.zero_gradients.sum().float())
    return dict(zip(COUNTS, counts, strict=True))


class ConsistencyTrainer(CheckpointedTrainer):
    """The part of a step that heads or a verifier have in it."""

    bridge: ModelBridge
    space: PixelSpace
    verifier: Verifier | None  # whose network is `heads`

    _graphs: EncoderGraphs | None = None
    _original: Original | None = None  # for what keeps features where they were

    def _images(self, inputs: dict[str, Tensor], *heads: Any) -> Victim:
        """The batch under attack; `heads` as of `Victim`."""
        victim = Victim(self.bridge, self.space, inputs, *heads)
        if self.args.cuda_graphs:
            self._graphs = victim.graphs = self._graphs or EncoderGraphs()
        return victim

    @property
    def _share(self) -> float:
        """The share of a batch in the gradients of an optimizer step."""
        return 1 / getattr(self, "current_gradient_accumulation_steps", 1)  # unset outside of train()

    @property
    def _ball(self) -> ThreatModel:
        """What the attack of this step may change: eps is ARM's, and rises in a warm-up."""
        return ThreatModel(self.args.threat.norm, self.eps * self._eps_share())

    @property
    def _of_consistency(self) -> bool:
        """Whether this step is of S_c alone."""
        return self.verifier is not None and self.state.global_step % (self.args.consistency_steps + 1) > 0

    def _consistency_side(self, inputs: dict[str, Tensor], *, keep: bool) -> Part:
        """Images that maximise inconsistency with all that is said of them, and nothing of the language model."""
        image, text = self.bridge.inputs(inputs)
        stated = self._read_statements(inputs)
        if "pixel_values" not in inputs or stated is None:
            return Part(text, [], None, None, {})
        assert self.verifier is not None
        victim = self._images(inputs)
        result = inconsistent(
            self.verifier,
            victim,
            stated,
            victim.pixels(),
            self._ball,
            INNER_STEPS,
            self._attack_seed,
            inputs["sample_ids"],
        )
        self.passes = self.passes + result.passes
        self._count(vision_forward=1, vision_backward=1)
        model_input = result.model_input.to(self.bridge.model.dtype)
        view = View.of(lambda: victim.encode(model_input), self.args.device, keep=keep)
        before = self._before(inputs["pixel_values"], image) if self.args.anchor else None
        return Part(text, [view], None, None, bad_gradients(result), stated, before)

    def _before(self, pixel_values: Tensor, image: dict[str, Tensor]) -> Tensor:
        """h_v of these images before training, (N, T, D), no gradient."""
        assert self._original is not None
        self._count(vision_forward=1)
        return self._original.features(pixel_values, image)

    def _read_texts(self, inputs: dict[str, Tensor], text: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """h_t of the texts (N, text_dim) and of their wrong answers (N * K, text_dim); None if not needed.

        Computed once per step, in evaluation mode, for the attack and the contrastive loss.
        """
        if not isinstance(self.heads, ConsistencyHeads):
            return None, None
        wrong = negative_texts(inputs, text) if self.args.gamma else {}
        with frozen(self.bridge.model), torch.no_grad():
            own = self.bridge.encode_text(**text)
            other = self.bridge.encode_text(**wrong) if wrong else None
        self._count(text_forward=1 + bool(wrong))
        return own, other

    def _read_statements(self, inputs: dict[str, Tensor]) -> Texts | None:
        """What the verifier reads of the batch, differentiable; None without one. Read once per step."""
        if self.verifier is None:
            return None
        with torch.set_grad_enabled(self.args.gamma > 0 or self._of_consistency):
            return self.verifier.read(inputs)

    def _contrast(self, parts: list[Part], text: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_contrastive over clean and adversarial images (0-d), and S_c (N,) of each, by name, detached.

        Its gradients stay at the heads and at the leaves of all views. `text` is that of all these parts.

        The text side of the model (`own`, `wrong`) is not trained by this loss: its gradient would cost a second pass
        of the language model per wrong answer. In distributed training each process computes the loss of the whole
        batch, with the samples of the others as negatives too.
        """
        heads, weight = self.heads, self._share * self.args.gamma
        assert isinstance(heads, ConsistencyHeads)
        with torch.set_grad_enabled(weight > 0):
            t = torch.cat([heads.project_text(part.own) for part in parts if part.own is not None])
            wrong = [heads.project_text(part.wrong) for part in parts if part.wrong is not None]
            wrong = [] if ranks.any_of(not wrong) else wrong  # a batch has them where every sample has
            ranks.check_equal(sum(map(len, wrong)), "wrong answers")
            t_wrong = ranks.gather(torch.cat(wrong)) if wrong else None
            groups = text_groups(ranks.gather_ragged(packed_text(*self.bridge.own_texts(text)), -1))
            tokens = [self.bridge.image_tokens(part.texts) for part in parts]
            projected = [
                torch.cat([heads.project_image(view.leaf, n) for view, n in zip(views, tokens, strict=True)])
                for views in zip(*(part.views for part in parts), strict=True)
            ]
            every_t = ranks.gather(t)
            losses = [contrastive_loss(heads, ranks.gather(v), every_t, t_wrong, groups=groups) for v in projected]
            loss = torch.stack(losses).mean()
        if weight:
            self._backward(weight * loss)
        # A run without attacks has the clean view alone.
        scores = [heads.score(v, t).detach() for v in projected]
        return {"loss_contrastive": loss.detach(), **dict(zip(("s_c_clean", "s_c_adv"), scores, strict=False))}

    def _verify(self, parts: list[Part]) -> dict[str, Tensor]:
        """As `_contrast`, by the verifier: the cross-entropy of the right answers among their alternatives, over all
        that is said of each picture. A sample's loss does not depend on the others of its batch. In a step of S_c
        alone it is of adversarial images, and the whole loss but for how far their features are from where the clean
        ones were (`MBATConfig.anchor`)."""
        verifier, alone = self.verifier, self._of_consistency
        assert verifier is not None
        weight = self._share * (1.0 if alone else self.args.gamma)
        tokens = [self.bridge.image_tokens(part.texts) for part in parts]
        with torch.set_grad_enabled(weight > 0):
            log_p = [
                torch.cat(
                    [
                        verifier.log_p(view.leaf, part.stated, n)
                        for view, part, n in zip(views, parts, tokens, strict=True)
                        if part.stated is not None
                    ]
                )
                for views in zip(*(part.views for part in parts), strict=True)
            ]
            loss = -torch.stack(log_p).mean()
        if weight:
            self._backward(weight * loss)
        if alone:
            return {"loss_consistency": loss.detach()} | self._anchored(parts)
        scores = [each.detach().exp() for each in log_p]
        return {"loss_contrastive": loss.detach(), **dict(zip(("s_c_clean", "s_c_adv"), scores, strict=False))}

    def _anchored(self, parts: list[Part]) -> dict[str, Tensor]:
        """The mean distance of features from where they were, by name; its gradients stay at the views' leaves."""
        count, losses = sum(len(part.before) for part in parts if part.before is not None), []
        for part in parts:  # one by one: distances are in float32
            if part.before is None:
                continue
            loss = squared_distance(part.views[0].leaf, part.before).sum() / count
            self._backward(self._share * self.args.anchor * loss)
            part.before = None
            losses.append(loss.detach())
        return {"loss_drift": torch.stack(losses).sum()} if losses else {}

    def _backward(self, loss: Tensor) -> None:
        """Adds its gradients to `.grad`. DeepSpeed's engine gets them at the end of an optimizer step (`zero.step`)."""
        if self.is_deepspeed_enabled:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def _count(self, **passes: int) -> None:
        self.passes = self.passes + Passes(**passes)

    @property
    def _attack_seed(self) -> int:
        return self.args.seed + 7_919 * self.state.global_step

    def _eps_share(self) -> float:
        """The current fraction of eps: a linear warm-up over `eps_warmup` of all steps."""
        warmup = self.args.eps_warmup * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / warmup) if warmup >= 1 else 1.0
