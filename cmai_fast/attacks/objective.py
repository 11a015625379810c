"""What an image attack maximises: alpha * L_task - beta * S_c, per sample, for a fixed batch of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmai_fast.bridge import (
    BatchImages,
    ModelBridge,
    frozen,
    lean_activations,
    patches_by_matmul,
    recomputed,
    unpacked,
)
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.threat import PixelSpace


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
class Objective(BatchImages):
    """alpha * L_task - beta * S_c of images in the model's input space, for a batch of texts and labels.

    Images come as the attack moves them: (N, C, H, W) where a sample is one image, units (N, U, C, h, w) of `layout`
    where it is several, tiles or patches. `pixels` gives those of the batch, and `inputs` turns attacked ones into what
    the model's own forward takes.

    Args:
        bridge: of the model under attack, from `bridge_of`.
        space: pixels in [0, 1] to the model's input.
        batch: what the model's own forward takes; at least `bridge.needs` (for a generative model `input_ids`,
            `attention_mask`, `labels`, each (N, L)). Keys that it does not take are ignored.
        alpha, beta: weights; beta != 0 needs `heads`.
        heads: consistency heads. S_c is that of the true response, whose text side no image perturbation moves: it is
            computed once.
        text_features: h_t (N, text_dim) of the batch, where the caller has it already.

    Raises:
        ValueError: a key of the batch is missing or has another shape, or beta != 0 without heads.
    """

    bridge: ModelBridge
    space: PixelSpace
    batch: Mapping[str, Tensor]
    alpha: float = 1.0
    beta: float = 0.0
    heads: ConsistencyHeads | None = None
    text_features: Tensor | None = None
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        super().__init__(self.bridge, self.space, self.batch)
        if self.beta and self.heads is None:
            raise ValueError(f"beta is {self.beta}, but there are no consistency heads; give heads or set beta to 0")
        self._text: Tensor | None = None
        self._tokens = self.bridge.image_tokens(self.batch)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Context in which the model is lent to an attack: frozen, differentiable where it is quantised, recomputing
        where it does so in training, its MLPs lean, and its patch embedding quick at the pixels."""
        model = self.bridge.model
        cheap = unpacked(model), recomputed(model), patches_by_matmul(model), lean_activations(model)
        with cheap[0], cheap[1], cheap[2], cheap[3], frozen(model, self.heads):
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
        tokens = self._tokens
        if rows is not None:
            text, tokens = text[rows], None if tokens is None else tokens[rows]
        return self.heads.score(self.heads.project_image(image_features, tokens), text)

    def __call__(self, model_input: Tensor, rows: Tensor | None = None) -> Evaluation:
        """Normalised images (n, C, H, W) belonging to `rows` (n,) of the batch (None: all), differentiable."""
        features = self.encode(model_input, rows)
        loss, right = self.bridge.losses(features, **self.rows(self.batch, rows))
        self.passes.full_forward += 1
        loss = self.alpha * loss
        score = None
        if self.heads is not None:
            score = self.score(features, rows)
            if self.beta:
                loss = loss - self.beta * score
        return Evaluation(loss, right, score)

    def _differentiate(self, losses: Tensor, leaf: Tensor) -> Tensor:
        """d sum(losses) / d leaf, each row's from its own loss.

        In float16 the losses as they are would leave 39% of the pixels of `easyvqa-llava` without a gradient (62% of
        the immunised model): it falls below 6e-8 on its way, the sooner the surer the model is. So each is scaled up,
        as far as the row's gradient stays finite.
        """
        if all(p.dtype != torch.float16 for p in self.bridge.model.parameters()):
            return torch.autograd.grad(losses.sum(), leaf)[0]
        surety = torch.exp2(torch.log2(losses.detach().abs().clamp(2.0**-24, 1.0)).floor())
        found, rows = torch.empty_like(leaf), torch.ones_like(losses, dtype=torch.bool)
        for scale in (2.0**10 / surety, 2.0**4 / surety, torch.ones_like(surety)):
            (grad,) = torch.autograd.grad((losses * scale).sum(), leaf, retain_graph=True)
            found[rows] = (grad / scale.view(-1, *[1] * (leaf.dim() - 1)))[rows]
            rows = rows & ~grad.flatten(1).isfinite().all(1)
            if not rows.any():
                break
        return found

    def gradient(self, model_input: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Evaluation]:
        """d loss / d model_input, like `model_input`, and the evaluation at that point, detached.

        Each row's gradient is its own: losses are summed, never averaged, so the batch size cannot change it.
        """
        with torch.enable_grad():
            leaf = model_input.detach().clone().requires_grad_()
            at = self(leaf, rows)
            grad = self._differentiate(at.loss, leaf)
        self.passes.full_backward += 1
        return grad, Evaluation(at.loss.detach(), at.right, None if at.score is None else at.score.detach())
