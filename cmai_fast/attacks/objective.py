"""What an image attack maximises: alpha * L_task - beta * S_c, per sample, for a fixed batch of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmai_fast.bridge import Bridge, frozen, is_right, patches_by_matmul, recomputed, task_loss, unpacked
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.threat import PixelSpace

TEXT_KEYS = ("input_ids", "attention_mask", "labels")


@dataclass
class Passes:
    """Model passes, counted in batches: `full` runs the whole model, `vision` and `text` one side alone."""

    full_forward: int = 0
    full_backward: int = 0
    vision_forward: int = 0
    vision_backward: int = 0
    text_forward: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(**{k: v + getattr(other, k) for k, v in vars(self).items()})


@dataclass
class Evaluation:
    """One look at a batch of N images: `loss` (N,) as maximised, `right` (N,) bool, `score` S_c (N,) or None."""

    loss: Tensor
    right: Tensor
    score: Tensor | None


@dataclass
class Objective:
    """alpha * L_task - beta * S_c of images in the model's input space, for a batch of texts and labels.

    Args:
        bridge: of the model under attack.
        space: pixels in [0, 1] to the model's input.
        batch: `input_ids`, `attention_mask`, `labels` (N, L); other keys are ignored.
        alpha, beta: weights; beta != 0 needs `heads`.
        heads: consistency heads. S_c is that of the true response, whose text side no image perturbation moves: it is
            computed once.
        text_features: h_t (N, text_dim) of the batch, where the caller has it already.

    Raises:
        ValueError: a key of the batch is missing or has another shape, or beta != 0 without heads.
    """

    bridge: Bridge
    space: PixelSpace
    batch: Mapping[str, Tensor]
    alpha: float = 1.0
    beta: float = 0.0
    heads: ConsistencyHeads | None = None
    text_features: Tensor | None = None
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        missing = [k for k in TEXT_KEYS if k not in self.batch]
        if missing:
            raise ValueError(f"the batch has no {', no '.join(missing)}; an attack needs {', '.join(TEXT_KEYS)}")
        if self.beta and self.heads is None:
            raise ValueError(f"beta is {self.beta}, but there are no consistency heads; give heads or set beta to 0")
        self.batch = {k: self.batch[k] for k in TEXT_KEYS}
        if len({v.shape for v in self.batch.values()}) > 1:
            shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.batch.items())
            raise ValueError(f"the batch has {shapes}; expected one shape (N, L) for all three")
        self._text: Tensor | None = None

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Context in which the model is lent to an attack: frozen, differentiable where it is quantised, recomputing
        where it does so in training, and its patch embedding quick at the pixels."""
        model = self.bridge.model
        with unpacked(model), recomputed(model), patches_by_matmul(model), frozen(model, self.heads):
            yield

    def text_projection(self) -> Tensor:
        """P_t(h_t) of prompt and true response, (N, dim), no gradient."""
        assert self.heads is not None
        if self._text is None:
            with torch.no_grad():
                if self.text_features is None:
                    self.text_features = self.bridge.encode_text(**self.batch)
                    self.passes.text_forward += 1
                self._text = self.heads.project_text(self.text_features)
        return self._text

    def score(self, image_features: Tensor, rows: Tensor | None = None) -> Tensor:
        """S_c (n,) of h_v (n, T, image_dim) against the texts of `rows`."""
        assert self.heads is not None
        text = self.text_projection()
        return self.heads.score(self.heads.project_image(image_features), text if rows is None else text[rows])

    def __call__(self, model_input: Tensor, rows: Tensor | None = None) -> Evaluation:
        """Normalised images (n, C, H, W) belonging to `rows` (n,) of the batch (None: all), differentiable."""
        features = self.bridge.encode_image(model_input)
        batch = self.batch if rows is None else {k: v[rows] for k, v in self.batch.items()}
        logits, targets = self.bridge.fuse(features, **batch)
        self.passes.full_forward += 1
        loss = self.alpha * task_loss(logits, targets)
        score = None
        if self.heads is not None:
            score = self.score(features, rows)
            if self.beta:
                loss = loss - self.beta * score
        return Evaluation(loss, is_right(logits.detach(), targets), score)

    def gradient(self, model_input: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Evaluation]:
        """d loss / d model_input, like `model_input`, and the evaluation at that point, detached.

        Each row's gradient is its own: losses are summed, never averaged, so the batch size cannot change it.
        """
        with torch.enable_grad():
            leaf = model_input.detach().clone().requires_grad_()
            at = self(leaf, rows)
            (grad,) = torch.autograd.grad(at.loss.sum(), leaf)
        self.passes.full_backward += 1
        return grad, Evaluation(at.loss.detach(), at.right, None if at.score is None else at.score.detach())
