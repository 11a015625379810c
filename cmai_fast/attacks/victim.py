"""The victim of an attack: a batch of images and texts bound to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmai_fast.bridge import (
    BatchImages,
    ModelBridge,
    frozen,
    is_right,
    lean_activations,
    patches_by_matmul,
    recomputed,
    task_loss,
    unpacked,
)
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.pixels import PixelSpace

if TYPE_CHECKING:
    from cmai_fast.attacks.captions import Captions
    from cmai_fast.attacks.deployed import Deployed
    from cmai_fast.attacks.losses import Loss
    from cmai_fast.attacks.others import OtherAnswers
    from cmai_fast.attacks.prompts import Prompts
    from cmai_fast.attacks.words import Words


# (h_v (n, T, image_dim), how many of its tokens are no padding (n,), rows of the batch) -> S_c (n,), differentiable.
Scorer = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass
class Passes:
    """Model passes, counted in batches: `full` runs the whole model, `vision` and `text` one side alone."""

    full_forward: int = 0
    full_backward: int = 0
    vision_forward: int = 0
    vision_backward: int = 0
    text_forward: int = 0
    text_backward: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(**{k: v + getattr(other, k) for k, v in vars(self).items()})


@dataclass
class Evaluation:
    """A batch of N images evaluated: `loss` (N,) as maximised, `right` (N,) bool."""

    loss: Tensor
    right: Tensor


@contextmanager
def attack_mode(model: nn.Module, *others: nn.Module | None) -> Iterator[None]:
    """As `Victim.attack_mode`; `others` are frozen with the model."""
    with unpacked(model), recomputed(model), patches_by_matmul(model), lean_activations(model), frozen(model, *others):
        yield


class Victim(BatchImages):
    """A batch under attack, bound to its model.

    Args:
        bridge, space, batch: as of `BatchImages`.
        heads: consistency heads, for losses that use S_c. S_c is that of the true response; its text side does not
            depend on the image and is computed once.
        text_features: h_t (N, text_dim) of the batch, if the caller has it already.
        scorer: S_c in place of that of heads, such as `Verifier.scorer`.

    Attributes:
        deployed: the guard around the model, for the adaptive attack; None: there is none.
        words: the prompts, if they are under attack too (`Words`).
        prompts: what users typed, for attacks that change it (`Prompts`, of a dual encoder `Captions`); None: unknown.
        exact: whether a text counts as wrong as soon as a token differs from the label. If not, no sample counts as
            fooled, so that attacks take all their steps and return the image with the highest loss.
        targeted: the labels are the answers that the attacker wants. Losses of the response then have the other sign,
            and a sample counts as fooled when the model gives its label.
        others: the other answers that a sample may give, for losses over closed answers; None: unknown.
        origin: (N, ...) images in [0, 1] inside the ball, where attacks begin in place of a random point; None: there.
        common: (C, H, W), what a universal attack adds to every image; None: it is found on this batch.

    `passes` counts the model passes of batches; `forwards` and `backwards` (N,) int64 those of the whole model that
    each sample was in.

    Raises:
        ValueError: a key of the batch is missing or has another shape.
    """

    def __init__(
        self,
        bridge: ModelBridge,
        space: PixelSpace,
        batch: Mapping[str, Tensor],
        heads: ConsistencyHeads | None = None,
        text_features: Tensor | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(bridge, space, batch)
        self.heads, self.text_features, self.scorer = heads, text_features, scorer
        self.passes = Passes()
        self.deployed: Deployed | None = None
        self.words: Words | None = None
        self.prompts: Prompts | Captions | None = None
        self.exact, self.targeted = True, False
        self.others: OtherAnswers | None = None
        self.origin: Tensor | None = None
        self.common: Tensor | None = None
        self.forwards = torch.zeros(len(self), dtype=torch.int64, device=self.batch["labels"].device)
        self.backwards = torch.zeros_like(self.forwards)
        self._text: Tensor | None = None
        self._own_features: Tensor | None = None
        self._tokens = bridge.image_tokens(self.batch)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context for one attack: inside, `passes` are its own; afterwards those before as well, also after an
        exception."""
        before, self.passes = self.passes, Passes()
        try:
            yield
        finally:
            self.passes = before + self.passes

    @contextmanager
    def attack_mode(self) -> Iterator[None]:
        """Context for attacks: the model is frozen, differentiable if quantised, recomputes activations as in training,
        and has memory-saving MLPs and a fast patch embedding. It is restored afterwards, also after an exception."""
        with attack_mode(self.bridge.model, self.heads):
            yield

    def ran(self, rows: Tensor | None, *, backward: bool = False) -> None:
        """Counts a pass of the whole model over `rows` (None: all)."""
        count = self.backwards if backward else self.forwards
        count = count + 1 if rows is None else count.index_add(0, rows, torch.ones_like(rows))
        if backward:
            self.passes.full_backward, self.backwards = self.passes.full_backward + 1, count
        else:
            self.passes.full_forward, self.forwards = self.passes.full_forward + 1, count

    def read(self, model_input: Tensor, rows: Tensor | None = None) -> Tensor:
        """Images of `rows` in this victim's input space to the model's; the same, unless the victim is an upload."""
        return model_input

    def outputs(self, image_features: Tensor, rows: Tensor | None = None) -> Outputs:
        """The language side's output for h_v (n, T, image_dim), computed on access."""
        return Outputs(self, image_features, rows)

    def __call__(self, model_input: Tensor, rows: Tensor | None = None, loss: Loss | None = None) -> Evaluation:
        """Normalised images (n, C, H, W) that belong to `rows` (n,) of the batch (None: all), differentiable.

        `loss`: what is maximised; None: the task's cross-entropy.
        """
        features = self.encode(model_input, rows)
        outputs = self.outputs(features, rows)
        losses = outputs.losses if loss is None else loss(features, outputs, self, rows)
        return Evaluation(losses, outputs.right)

    def right(self, pixels: Tensor) -> Tensor:
        """Whether every target token is the most likely one, under teacher forcing, (N,) bool: the fast verdict.

        `pixels`: images in [0, 1], as `pixels()` gives them.
        """
        with frozen(self.bridge.model), torch.no_grad():
            return self(self.space.to_model(pixels)).right

    def text_projection(self) -> Tensor:
        """P_t(h_t) of prompt and true response, (N, dim), no gradient."""
        heads = self._heads()
        if self._text is None:
            with torch.no_grad():
                if self.text_features is None:
                    self.text_features = self.bridge.encode_text(**self.batch)
                    self.passes.text_forward += 1
                self._text = heads.project_text(self.text_features)
        return self._text

    def score(self, image_features: Tensor, rows: Tensor | None = None) -> Tensor:
        """S_c (n,) of h_v (n, T, image_dim) against the texts of `rows`.

        Raises:
            ValueError: there are no heads and no scorer.
        """
        if self.scorer is not None:
            return self.scorer(image_features, self.image_tokens(rows), rows)
        heads, text = self._heads(), self.text_projection()
        text = text if rows is None else text[rows]
        return heads.score(heads.project_image(image_features, self.image_tokens(rows)), text)

    @property
    def scores(self) -> bool:
        """Whether there is an S_c."""
        return self.scorer is not None or self.heads is not None

    def image_tokens(self, rows: Tensor | None = None) -> Tensor | None:
        """How many tokens of h_v are no padding (n,); None: all."""
        return self._tokens if rows is None or self._tokens is None else self._tokens[rows]

    def own_features(self, rows: Tensor | None = None) -> Tensor:
        """h_v (n, T, image_dim) of the batch's own images, no gradient, computed once."""
        if self._own_features is None:
            with torch.no_grad():
                self._own_features = self.encode(self.space.to_model(self.pixels()))
            self.passes.vision_forward += 1
        return self._own_features if rows is None else self._own_features[rows]

    def _heads(self) -> ConsistencyHeads:
        if self.heads is None:
            raise ValueError(
                "the loss uses S_c, but there are no consistency heads; pass heads to Victim, or set beta to 0"
            )
        return self.heads


class Outputs:
    """The language side's outputs for features of `rows`; each is computed once, on first access.

    `losses` (n,) and `right` (n,) do not need the logits of all tokens in memory (`Bridge.losses`). A loss that needs
    the logits accesses `logits` first, which stores them all.
    """

    def __init__(
        self,
        victim: Victim,
        features: Tensor,
        rows: Tensor | None,
        texts: Mapping[str, Tensor] | None = None,
        chosen: bool = False,
    ) -> None:
        """`texts`: inputs of `Bridge.fuse` in place of the victim's own, of the whole batch or, if `chosen`, of `rows`,
        in which a row may then stand several times."""
        self._victim, self._features, self._rows, self._chosen = victim, features, rows, chosen
        self._batch = victim.batch if texts is None else texts
        self._losses: tuple[Tensor, Tensor] | None = None
        self._logits: tuple[Tensor, Tensor] | None = None

    def _texts(self) -> Mapping[str, Tensor]:
        return self._batch if self._chosen else self._victim.rows(self._batch, self._rows)

    def _said(self) -> AbstractContextManager[None]:
        words = self._victim.words
        if words is None:
            return nullcontext()
        if self._batch is not self._victim.batch:
            raise ValueError("the words of a victim are under attack, and other texts are asked for; expected its own")
        return words.said(self._rows)

    def _judged(self) -> tuple[Tensor, Tensor]:
        if self._losses is None:
            if self._logits is not None:
                logits, targets = self._logits
                self._losses = task_loss(logits, targets), is_right(logits.detach(), targets)
            else:
                with self._said():
                    self._losses = self._victim.bridge.losses(self._features, **self._texts())
                self._victim.ran(self._rows)
        return self._losses

    def _fused(self) -> tuple[Tensor, Tensor]:
        if self._logits is None:
            with self._said():
                self._logits = self._victim.bridge.fuse(self._features, **self._texts())
            self._victim.ran(self._rows)
        return self._logits

    @property
    def losses(self) -> Tensor:
        """L_task (n,): the mean cross-entropy over a sample's target tokens."""
        return self._judged()[0]

    @property
    def right(self) -> Tensor:
        """(n,) bool, no gradient: the attack has not succeeded. Every target token is the most likely one, or if the
        victim is `targeted`, one is not; True if the victim is not `exact`."""
        right = self._judged()[1]
        if not self._victim.exact:
            return torch.ones_like(right)
        return ~right if self._victim.targeted else right

    @property
    def logits(self) -> Tensor:
        """(n, L', vocabulary), of every column in which any of the rows has a label."""
        return self._fused()[0]

    @property
    def targets(self) -> Tensor:
        """(n, L'), -100 where a row has no target."""
        return self._fused()[1]
