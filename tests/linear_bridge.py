"""A linear two-class model behind the interface of `Bridge`: what an attack should find on it has a closed form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmai_fast.attacks import Victim
from cmai_fast.bridge import Bridge
from cmai_fast.bridge.one_image import OneImageBridge
from cmai_fast.pixels import PixelSpace

SHAPE = (3, 4, 4)
SPACE = PixelSpace([0.5, 0.4, 0.3], [0.5, 0.25, 0.2])


class LinearBridge(OneImageBridge):
    """Logits (0, <w, x_model> + bias); the label is class 0, so that the loss rises with <w, x_model>."""

    needs = text_keys = Bridge.needs
    image_size = None

    def __init__(self, dtype: torch.dtype = torch.float64, bias: float = -8.0) -> None:
        self.model: nn.Linear = nn.Linear(48, 2, dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.weight[1] = 0.2 * torch.randn(48, generator=generator, dtype=torch.float64)
            self.model.bias.copy_(torch.tensor([0.0, bias]))

    def _encode(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.flatten(1).unsqueeze(1)

    def select(
        self, inputs: Mapping[str, Tensor], rows: Tensor, images_per_row: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {k: v[rows] for k, v in inputs.items()}

    def fuse(
        self, features: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.model(features), labels[:, 1:]

    def direction(self) -> Tensor:
        """d<w, x_model>/d pixels, (3, 4, 4)."""
        return self.model.weight[1].detach().view(SHAPE) / SPACE.std.to(self.model.weight)[:, None, None]

    def victim(self, rows: int) -> Victim:
        ids = torch.tensor([[1, 0]]).repeat(rows, 1)
        labels = torch.tensor([[-100, 0]]).repeat(rows, 1)
        return Victim(self, SPACE, {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": labels})  # type: ignore[arg-type]
