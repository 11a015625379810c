"""The images of a batch as pictures with rows and columns, for attacks that draw into them."""

from __future__ import annotations

import torch
from torch import Tensor

from cmai_fast.attacks.victim import Victim


class Canvas:
    """Images as an attack takes them, and the same pixels as pictures (n, C, K * H, W), K pictures above one another.

    A picture is an image, or a tile of one where the model reads tiles; flattened patches are put together again.
    Pictures that are smaller than the largest are padded at the right and below.

    Args:
        victim: the batch.
        clean: (N, C, H, W), or units of its layout.

    Attributes:
        sizes: (N, K, 2) height and width of each picture, 0 where a sample has fewer than K.
        height: H.
    """

    def __init__(self, victim: Victim, clean: Tensor) -> None:
        self.layout, self._places = victim.layout, None
        if self.layout is None:
            self.height, self.width = int(clean.shape[-2]), int(clean.shape[-1])
            size = torch.tensor([self.height, self.width], device=clean.device)
            self.sizes = size.expand(len(clean), 1, 2)
            return
        # Row by row: the row and column of each pixel, its picture's number, and -1 for padding.
        y, x, number = (part.to(clean.device) for part in self.layout.coordinates(clean))
        count = int(number.max()) + 1 if number.numel() else 0
        there = number >= 0
        flat = (
            number.clamp_min(0) + torch.arange(len(number), device=number.device)[:, None] * max(count, 1)
        ).flatten()
        sizes = []
        for part in (y, x):
            most = torch.zeros(len(number) * max(count, 1), dtype=torch.int64, device=number.device)
            ends = torch.where(there, part + 1, 0).flatten()
            sizes.append(most.scatter_reduce(0, flat, ends, "amax").view(len(number), -1))
        self.sizes = torch.stack(sizes, -1)
        self.height, self.width = (int(v) for v in self.sizes.flatten(0, 1).amax(0)) if len(number) else (0, 0)
        self._places = torch.where(there, (number * self.height + y) * self.width + x, -1)

    def pictures(self, images: Tensor, rows: Tensor) -> Tensor:
        """Images of `rows` (n,) of the batch, as pictures; padding is 0."""
        if self._places is None:
            return images
        places = self._places[rows]
        pixels = images.transpose(1, 2).flatten(2)  # (n, C, U * h * w)
        size = self.sizes.shape[1] * self.height * self.width
        found = pixels.new_zeros(*pixels.shape[:2], size + 1)  # padding goes to the last place
        found.scatter_(2, torch.where(places < 0, size, places)[:, None].expand_as(pixels), pixels)
        return found[..., :-1].unflatten(2, (-1, self.width))

    def images(self, pictures: Tensor, rows: Tensor, like: Tensor) -> Tensor:
        """The reverse of `pictures`, for images shaped like those of the batch, `like` (N, ...)."""
        if self._places is None:
            return pictures
        places = self._places[rows][:, None].expand(-1, pictures.shape[1], -1)
        pixels = pictures.flatten(2).gather(2, places.clamp_min(0)).masked_fill(places < 0, 0.0)
        units, height, width = like.shape[1], *like.shape[-2:]
        return pixels.unflatten(2, (units, height, width)).transpose(1, 2).contiguous()
