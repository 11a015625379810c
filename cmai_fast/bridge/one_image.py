"""The base class of bridges to models with exactly one image per sample: dual encoders and encoder-decoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmai_fast.bridge.labels import is_right, task_loss


class OneImageBridge(ABC):
    """The image side and the bookkeeping; a subclass encodes and fuses. Images are (N, 3, H, W), one per sample."""

    needs: tuple[str, ...] = ("labels",)
    image_keys: tuple[str, ...] = ()
    text_keys: tuple[str, ...] = ("labels",)
    model: Any
    image_size: int | None

    @abstractmethod
    def _encode(self, pixel_values: Tensor) -> Tensor:
        """h_v (N, T, image_dim) of images of the right size."""

    @abstractmethod
    def fuse(self, image_features: Tensor, *args: Any, **text_inputs: Any) -> tuple[Tensor, Tensor]:
        """F: h_v and the text to logits (N, L', V) and targets (N, L')."""

    def inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {k: batch[k] for k in self.text_keys if k in batch}

    def image_tokens(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return None

    def images_per_row(self, pixel_values: Tensor, **_: Any) -> Tensor:
        return torch.ones(len(pixel_values), dtype=torch.int64, device=pixel_values.device)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """E_v: normalised `pixel_values` (N, 3, H, W) to h_v (N, T, image_dim), differentiable.

        Raises:
            ValueError: images of the wrong size.
        """
        check_size(self.model, pixel_values, self.image_size)
        return self._encode(pixel_values)

    def losses(self, image_features: Tensor, **text_inputs: Any) -> tuple[Tensor, Tensor]:
        """`task_loss` (N,), differentiable, and `is_right` (N,) of the result of `fuse` for the same arguments."""
        logits, targets = self.fuse(image_features, **text_inputs)
        return task_loss(logits, targets), is_right(logits.detach(), targets)


def check_size(model: Any, pixel_values: Tensor, size: int | None) -> None:
    """Raises ValueError for images that are not (N, 3, size, size); a model without a fixed size takes any."""
    if isinstance(size, int) and (pixel_values.dim() != 4 or tuple(pixel_values.shape[-2:]) != (size, size)):
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}; {type(model).__name__} reads (N, 3, {size}, "
            f"{size}). Resize the images with the model's own processor"
        )
