"""What an image attack maximises: alpha * L_task - beta * S_c, per sample, for a fixed batch of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cmai_fast.bridge import (
    Bridge,
    frozen,
    lean_activations,
    patches_by_matmul,
    recomputed,
    unpacked,
)
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.layout import Layout
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

    bridge: Bridge
    space: PixelSpace
    batch: Mapping[str, Tensor]
    alpha: float = 1.0
    beta: float = 0.0
    heads: ConsistencyHeads | None = None
    text_features: Tensor | None = None
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        needs = self.bridge.needs
        missing = [k for k in needs if k not in self.batch]
        if missing:
            raise ValueError(f"the batch has no {', no '.join(missing)}; an attack needs {', '.join(needs)}")
        if self.beta and self.heads is None:
            raise ValueError(f"beta is {self.beta}, but there are no consistency heads; give heads or set beta to 0")
        self._pixel_values = self.batch.get("pixel_values")
        self._image, self.batch = self.bridge.inputs(self.batch)
        if needs == TEXT_KEYS and len({self.batch[k].shape for k in needs}) > 1:
            shapes = ", ".join(f"{k} {tuple(self.batch[k].shape)}" for k in needs)
            raise ValueError(f"the batch has {shapes}; expected one shape (N, L) for all three")
        self._text: Tensor | None = None
        self._tokens = self.bridge.image_tokens(self.batch)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    @cached_property
    def layout(self) -> Layout | None:
        """Where each sample's pixels lie in the batch's `pixel_values`; None: a sample is one image (C, H, W)."""
        values = self._pixel_values
        if values is None:
            return None
        if values.dim() not in (2, 4, 5):
            return Layout(values)  # which says what is wrong
        images = None
        if values.dim() != 5 or "image_sizes" in self.bridge.image_keys:  # else (N, images, ...), by sample already
            images = self.bridge.images_per_row(values, **self._image)
            if values.dim() == 4 and bool((images == 1).all()):
                return None
        mask = self._image.get("pixel_attention_mask")
        if values.dim() == 5 and mask is None and not self.space.mean.any():
            raise ValueError(
                "the processor's mean is 0, so a black tile looks like the zeros that fill up a sample, and would not "
                "be attacked; expected a mean above 0, or a batch with pixel_attention_mask"
            )
        return Layout(
            values,
            images,
            image_grid_thw=self._image.get("image_grid_thw"),
            patches=self.space.patches,
            pixel_attention_mask=mask,
        )

    def pixels(self) -> Tensor:
        """The batch's own images in [0, 1], as attacks take them; at least float32."""
        if self._pixel_values is None:
            raise ValueError("the batch has no pixel_values; expected those that the model's processor made")
        if self.layout is None:
            return self.space.to_pixels(self._pixel_values)
        return self.layout.only(self.space.to_pixels(self.layout.unpack(self._pixel_values)))

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """The batch as the model's own forward takes it, with these images in [0, 1] in place of its own."""
        return {**self._image, **self.batch, "pixel_values": self._pack(self.space.to_model(pixels))}

    def pictures(self, pixels: Tensor) -> list[list[np.ndarray]]:
        """Images in [0, 1] as 8-bit pictures (H, W, C), for each sample those of its images (or their tiles)."""
        layout = Layout(pixels) if self.layout is None else self.layout
        return layout.images(pixels.unsqueeze(1) if self.layout is None else pixels)

    def from_pictures(self, pictures: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """The reverse of `pictures`: images in [0, 1], as attacks take them."""
        if self.layout is not None:
            return self.layout.from_images(pictures)
        return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for (p,) in pictures])

    def split(self, pixels: Tensor) -> list[Tensor]:
        """Images as attacks take them to one tensor a sample: its own images, tiles or patches (u, C, h, w)."""
        return list(pixels.unsqueeze(1)) if self.layout is None else self.layout.split(pixels)

    def join(self, images: Sequence[Tensor]) -> Tensor:
        """The reverse of `split`, for images of this batch's samples; they may come from batches of other samples.

        Raises:
            ValueError: images that this batch's model does not read so.
        """
        if self._pixel_values is None:
            raise ValueError("the batch has no pixel_values; expected those that the model's processor made")
        if self.layout is not None:
            return self.layout.join(images)
        expected, given = [(1, *value.shape) for value in self._pixel_values], [tuple(image.shape) for image in images]
        if given != expected:
            raise ValueError(
                f"{len(given)} samples have images of shapes {sorted(set(given))}, and this model reads "
                f"{len(expected)} of {sorted(set(expected))}; images that were made on one model fit another only if "
                "it reads them alike"
            )
        return torch.cat(list(images)).to(self._pixel_values.device)

    def _pack(self, model_input: Tensor, rows: Tensor | None = None) -> Tensor:
        return model_input if self.layout is None else self.layout.pack(model_input, rows)

    def rows(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Mapping[str, Tensor]:
        if rows is None:
            return inputs
        return self.bridge.select(inputs, rows, None if self.layout is None else self.layout.images_per_row)

    def encode(self, model_input: Tensor, rows: Tensor | None = None) -> Tensor:
        """h_v of images in the model's input space that belong to `rows` (n,) of the batch (None: all)."""
        if self.layout is None and set(self._image) <= {"input_ids"}:
            return self.bridge.encode_image(model_input)  # one image a sample: nothing to share out
        return self.bridge.encode_image(self._pack(model_input, rows), **self.rows(self._image, rows))

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
