"""One step of adversarial training: clean branch, attack, adversarial branch, contrastive loss, vision side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from cmai_fast.attacks import Victim
from cmai_fast.attacks.words import Words, said
from cmai_fast.bridge import BatchImages, frozen
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.verifier import Texts
from cmai_fast.data.statements import STATEMENT_IDS
from cmai_fast.mbat import ranks, shards
from cmai_fast.mbat.batches import no_features, rows_with_images, without_images
from cmai_fast.mbat.consistency import COUNTS, bad_gradients
from cmai_fast.mbat.features import FeatureTrainer
from cmai_fast.mbat.inner import InnerResult, maximise, reworded
from cmai_fast.mbat.loss import sample_weights, smoothed_losses, users_loss
from cmai_fast.mbat.parts import WEIGHTS, Part, View, agreed, cut, take

T = TypeVar("T")


class StepTrainer(FeatureTrainer):
    """The step of `MBATTrainer`, which chooses the batch size and handles everything between steps.

    The language side detaches h_v, then backpropagates: one pass gives the language model's gradients and p, the bridge
    gradient. The vision side then runs one backward pass for all gradients accumulated at h_v.
    """

    _items: Tensor | int | None = None  # tokens of the current optimizer step, as Trainer counts them

    @property
    def _by_task_loss(self) -> bool:
        """Whether the outer loss is L_task, so that its gradient at the bridge is p."""
        return self.compute_loss_func is None and not self.args.label_smoothing_factor

    def _step(self, inputs: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss, by name, and the total, detached; gradients stay in `.grad`. At most `size` samples
        run at once."""
        args = self.args
        inputs = {**inputs, WEIGHTS: self._weights(inputs["labels"])}
        # accelerate puts autocast around the model's `forward`, which the parts of a model bypass.
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            self._check_images(rows_with_images(self.bridge, inputs))
            seen, batches = self._batches(inputs, size)
            keep = size >= len(inputs["labels"])
            side = self._consistency_side if self._of_consistency else self._language_side
            side = side if args.objective == "task" else self._feature_side
            parts = self._together(lambda: [side(batch, keep=keep) for batch in batches])
            names = dict.fromkeys(name for part in parts for name in part.sums)
            found = {name: torch.stack([p.sums[name] for p in parts if name in p.sums]).sum() for name in names}
            looked = [part for part in parts if part.views]
            if self.verifier:
                found |= self._together(lambda: self._verify(looked) if looked else {})
            elif self.heads is not None and looked:  # of all processes at once
                found |= self._contrast(looked, self.bridge.inputs(seen)[1])
        weights = {"loss_clean": 1 - self.lam if args.inner != "none" else 1.0, "loss_adv": self.lam}
        weights |= {"loss_contrastive": args.gamma, "loss_consistency": 1.0, "loss_drift": args.anchor}
        losses = [weights[k] * v for k, v in found.items() if k in weights]
        # A step of S_c alone has none if its samples have no image.
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=args.device)
        self._refuse_divergence("loss", float(total), found)
        self._together(lambda: self._vision_side(parts))
        return found, total

    def _together(self, run: Callable[[], T]) -> T:
        """The result of `run`. If memory runs out in one process, all split their step, if it can be split."""
        if shards.is_sharded(self.model):
            return shards.whole_or_not(run)
        if self.compute_loss_func is not None:
            return shards.whole_or_not(run, "A step with a compute_loss_func")
        return agreed(run)

    def _check_images(self, there: Tensor) -> None:
        """Raises ValueError for samples with and without an image where they would not make one loss."""
        together = self.heads is not None and self.verifier is None
        if together or shards.is_sharded(self.model):  # which work on those of all processes together
            ranks.check_equal(int(there.sum()), "samples with an image")
        if self.compute_loss_func is not None and there.any() and not there.all():
            raise ValueError(
                f"{int(there.sum())} of {len(there)} samples of a batch have an image, and compute_loss_func is given: "
                "samples with and without an image run apart, and a mean over a batch would be another one. Make "
                "batches of one kind, or leave compute_loss_func out"
            )

    def _batches(self, inputs: dict[str, Tensor], size: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The samples with images, and all samples in batches of at most `size`: those with images first."""
        there = rows_with_images(self.bridge, inputs)
        if there.all() and size >= len(there):
            return inputs, [inputs]
        if there.all():
            return inputs, cut(BatchImages(self.bridge, self.space, inputs), inputs, size)
        images, rows = BatchImages(self.bridge, self.space, inputs), there.nonzero().squeeze(1)
        seen, batches = inputs, []
        if len(rows):
            seen = take(images, inputs, rows)
            batches = cut(BatchImages(self.bridge, self.space, seen), seen, size)
        others = (~there).nonzero().squeeze(1).split(size)
        return seen, [*batches, *(without_images(images, inputs, rows) for rows in others)]

    def _weights(self, labels: Tensor) -> Tensor:
        """(N,) weights of the samples' losses in this batch's share of the loss."""
        processes = ranks.count() if self.args.average_tokens_across_devices else 1
        batches = round(1 / self._share)
        reduction = self.args.loss_reduction if self.args.objective == "task" else "samples"
        return sample_weights(self.bridge, labels, reduction, self._items, batches, processes)

    def _outer_loss(self, features: Tensor, text: dict[str, Tensor], weights: Tensor) -> Tensor:
        """The loss of these samples in this batch's share of the loss, 0-d, differentiable."""
        if self.compute_loss_func is not None:
            loss = users_loss(self.compute_loss_func, self.bridge, features, text, self._items)
            across = self.args.average_tokens_across_devices and self._items is not None
            return loss * ((ranks.count() if across else 1) / self._share)  # it is already the share of the whole step
        if self.args.label_smoothing_factor:
            losses = smoothed_losses(self.bridge, features, text, self.args.label_smoothing_factor)
        else:
            losses = self.bridge.losses(features, **text)[0]
        return (weights.to(losses) * losses).sum()

    def _language_side(self, inputs: dict[str, Tensor], *, keep: bool) -> Part:
        """The clean branch, the attack and the adversarial branch. Gradients stay at the language model and the leaves
        of the views. `keep`: keep the vision side's graph."""
        args, (image, text), weights = self.args, self.bridge.inputs(inputs), inputs[WEIGHTS]
        if "pixel_values" not in inputs:
            return self._text_side(text, weights)
        clean = View.of(lambda: self.bridge.encode_image(inputs["pixel_values"], **image), args.device, keep=keep)
        words = self._words(text)
        loss, p = self._clean_branch(clean.leaf, text, weights, words)
        part = Part(text, [clean], *self._read_texts(inputs, text), {"loss_clean": loss}, self._read_statements(inputs))
        if args.inner == "none":
            return part
        if args.modality == "text":
            assert words is not None
            part.sums |= self._on_words(words, clean.leaf, text, weights)
            return part
        # Without gamma nothing will add to the gradient at h_v, and its graph need not wait for the attack. In FSDP2 it
        # does: a backward pass here leaves no gradient at weights that the root gathers, such as the projector's.
        if not args.gamma and not shards.is_sharded(self.model):
            self._vision_side([part])
            clean.leaf.grad = clean.features = None
        victim = self._victim(inputs, part.own, part.stated, scores=self.beta > 0)
        victim.words = words
        result = self._attack(victim, inputs["sample_ids"], p)
        model_input = result.model_input.to(clean.leaf.dtype)
        adversarial = View.of(lambda: victim.encode(model_input), args.device, keep=keep)
        part.views.append(adversarial)
        part.sums |= self._adversarial_branch(adversarial.leaf, text, weights, words)
        part.sums |= bad_gradients(result)
        return part

    def _words(self, text: dict[str, Tensor]) -> Words | None:
        """The prompts, if they are attacked."""
        ball = self.args.words if self.args.inner != "none" else None
        return None if ball is None else Words(self.bridge, text, ball)

    def _on_words(self, words: Words, leaf: Tensor, text: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """Attacks the prompts alone, then the adversarial branch with the same h_v."""
        args = self.args
        _, passes = reworded(words, leaf, args.inner, steps=args.inner_steps, refreshes=args.refreshes)
        self.passes = self.passes + passes
        nothing = dict.fromkeys(COUNTS, torch.zeros((), device=leaf.device))
        return self._adversarial_branch(leaf, text, weights, words) | nothing

    def _adversarial_branch(
        self, leaf: Tensor, text: dict[str, Tensor], weights: Tensor, words: Words | None
    ) -> dict[str, Tensor]:
        lam = self.lam
        with torch.set_grad_enabled(lam > 0), said(words):
            loss = self._outer_loss(leaf, text, weights)
        self._count(full_forward=1, full_backward=1)
        if lam and loss.requires_grad:
            self._backward(self._share * lam * loss)
        return {"loss_adv": loss.detach()}

    def _text_side(self, text: dict[str, Tensor], weights: Tensor) -> Part:
        """Samples without an image: unless the text is attacked there is nothing to perturb, so both branches are the
        same."""
        features, words = no_features(self.bridge, text), self._words(text)
        if words is not None:
            loss, _ = self._clean_branch(features.requires_grad_(), text, weights, words)
            return Part(text, [], None, None, {"loss_clean": loss} | self._on_words(words, features, text, weights))
        loss = self._outer_loss(features, text, weights)
        self._count(full_forward=1, full_backward=1)
        if loss.requires_grad:  # false if only the vision side learns
            self._backward(self._share * loss)
        sums = {"loss_clean": loss.detach()}
        if self.args.inner != "none":
            sums |= {"loss_adv": loss.detach(), **dict.fromkeys(COUNTS, torch.zeros((), device=loss.device))}
        return Part(text, [], None, None, sums)

    def _vision_side(self, parts: list[Part]) -> None:
        for views in ([view for view in part.views if view.leaf.grad is not None] for part in parts):
            if not views:
                continue
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                remainder = torch.stack([view.pulled_back() for view in views]).sum()
            self._count(vision_forward=sum(view.features is None for view in views))
            if remainder.requires_grad:
                self._backward(remainder)

    def _clean_branch(
        self, leaf: Tensor, text: dict[str, Tensor], weights: Tensor, words: Words | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of the clean images (0-d, detached) and p per sample, (N, T, D), or None if no solver needs it.

        Leaves the gradients of the language model in `.grad`, that of the bridge in `leaf.grad`, and with p, that of
        `words` there. With another loss than L_task, p is None too: the solver computes its own, with one more full
        pass. (With label smoothing, the loss of a sample that the model is sure of falls while L_task rises.)
        """
        args = self.args
        weight = 1 - self.lam if args.inner != "none" else 1.0
        wants_p = args.inner == "bridge" and args.refreshes < args.inner_steps and self._by_task_loss
        if not weight and not wants_p:
            with torch.no_grad():
                return self._outer_loss(leaf, text, weights), None
        self._count(full_forward=1, full_backward=1)
        if not weight:
            with said(words):
                losses = self.bridge.losses(leaf, **text)[0]
            (p,) = torch.autograd.grad(losses.sum(), leaf)
            return (weights.to(losses) * losses).sum().detach(), p
        with said(words if wants_p else None):
            loss = self._outer_loss(leaf, text, weights)
        self._backward(self._share * weight * loss)
        if not wants_p:
            return loss.detach(), None
        assert leaf.grad is not None
        return loss.detach(), leaf.grad / (self._share * weight * weights.to(leaf))[:, None, None]

    def _victim(
        self, inputs: dict[str, Tensor], own: Tensor | None = None, stated: Texts | None = None, *, scores: bool = True
    ) -> Victim:
        """The batch under attack, with S_c if it `scores`."""
        if not scores:
            return self._images(inputs)
        if not self.verifier:
            heads = self.heads if isinstance(self.heads, ConsistencyHeads) else None
            return self._images(inputs, heads, own)
        victim = self._images(inputs)
        if stated is None and STATEMENT_IDS in inputs:
            with torch.no_grad():
                stated = self.verifier.read(inputs)
        victim.scorer = None if stated is None else self.verifier.scorer(stated)
        return victim

    def _attack(self, victim: Victim, sample_ids: Tensor, p: Tensor | None) -> InnerResult:
        """Adversarial images of the current model, in evaluation mode."""
        args = self.args
        with shards.quiet(self.model), frozen(self.heads):
            result = maximise(
                victim,
                victim.pixels(),
                self._ball,
                args.inner,
                alpha=args.alpha,
                beta=self.beta,
                balance=args.balance,
                steps=args.inner_steps,
                step_size=args.inner_step_size,
                refreshes=args.refreshes,
                bridge_gradient=p,
                seed=self._attack_seed,
                sample_ids=sample_ids,
            )
        self.passes = self.passes + result.passes
        return result

    def _refuse_divergence(self, what: str, value: float, values: Mapping[str, Tensor]) -> None:
        if not math.isfinite(value):
            means = {name: float(each.mean()) for name, each in values.items()}
            raise FloatingPointError(
                f"the {what} is not finite at step {self.state.global_step}: {means}. Lower the learning rate, or "
                "check for images or labels that the model does not expect; the last checkpoint is intact"
            )
