"""Where the pixels of each sample lie in what a model takes: images, tiles, or flattened patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Patches(NamedTuple):
    """How a processor of the Qwen-VL kind flattens an image: patches of `size` x `size`, `temporal` copies of each, in
    the order of blocks of `merge` x `merge`."""

    size: int
    temporal: int
    merge: int


class Layout:
    """Pixels by sample. A sample is a run of units of one size: images, tiles of images, or patches.

    An attack works on units (N, U, C, h, w), U being the most that a sample has; the others are padded with zeros at
    the end. `pack` turns units into the family's own `pixel_values`, differentiably, and `unpack` does the reverse:

    | `pixel_values` | families | a unit is |
    |---|---|---|
    | (images, C, H, W) | LLaVA, InternVL, Gemma 3 with several images or crops per sample | an image |
    | (images, tiles, C, H, W), zero-padded | LLaVA-NeXT, LLaVA-OneVision | a tile |
    | (N, images, C, H, W), zero-padded | SmolVLM, Idefics3 | an image or a split of one |
    | (patches, C * temporal * size * size) | Qwen-VL | a patch; its temporal copies are one and stay equal |

    Args:
        pixel_values: a batch as the processor makes it.
        images_per_row: (N,), as `Bridge.images_per_row` gives it; None where each row of `pixel_values` is a sample.
        image_grid_thw: (images, 3), of flattened patches.
        patches: how those are flattened, as `PixelSpace.patches`.
        pixel_attention_mask: (N, images, H, W), false where an image was padded to the size of its neighbours. Such
            pixels are always 0 to the model, and no attack moves them.

    Raises:
        ValueError: pixel_values of another shape, or patches that are frames of a video.
    """

    def __init__(
        self,
        pixel_values: torch.Tensor,
        images_per_row: torch.Tensor | None = None,
        *,
        image_grid_thw: torch.Tensor | None = None,
        patches: Patches | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
    ) -> None:
        device, shape = pixel_values.device, tuple(pixel_values.shape)
        self.patches: Patches | None = None
        self.grids, self.tiles = image_grid_thw, 0
        if pixel_values.dim() == 2:
            if image_grid_thw is None or patches is None:
                raise ValueError(
                    f"pixel_values have shape {shape}: flattened patches, which need image_grid_thw in the batch, and "
                    "patch_size, temporal_patch_size and merge_size of the processor (PixelSpace.from_processor)"
                )
            self.patches, self.channels = patches, shape[1] // (patches.temporal * patches.size**2)
            if self.channels * patches.temporal * patches.size**2 != shape[1]:
                raise ValueError(f"patches have {shape[1]} values; expected channels * {patches}")
            if (image_grid_thw[:, 0] != 1).any():
                raise ValueError(
                    f"image_grid_thw is {image_grid_thw.tolist()}; expected images, whose first number is 1"
                )
            units_per_image = image_grid_thw.prod(1).to(device)
            if int(units_per_image.sum()) != len(pixel_values):
                raise ValueError(
                    f"image_grid_thw {image_grid_thw.tolist()} makes {int(units_per_image.sum())} patches, "
                    f"pixel_values have {len(pixel_values)}; give the two that the processor made together"
                )
        elif pixel_values.dim() == 5:
            self.tiles = shape[1]
            # If the mean is 0, zeros may also be a black picture; a mask tells the two apart.
            there = (pixel_values.detach() if pixel_attention_mask is None else pixel_attention_mask).flatten(2).any(-1)
            units_per_image = (there * torch.arange(1, shape[1] + 1, device=device)).amax(1)
        elif pixel_values.dim() == 4:
            units_per_image = torch.ones(len(pixel_values), dtype=torch.int64, device=device)
        else:
            raise ValueError(f"pixel_values have shape {shape}; expected images, tiles or flattened patches")
        self.units_per_image = units_per_image
        images = torch.ones_like(units_per_image) if images_per_row is None else images_per_row.to(device)
        if int(images.sum()) != len(units_per_image):
            raise ValueError(f"the samples have {int(images.sum())} images in all, pixel_values {len(units_per_image)}")
        self.images_per_row = images
        row_of_image = torch.repeat_interleave(torch.arange(len(images), device=device), images)
        units_per_row = torch.zeros_like(images).index_add(0, row_of_image, units_per_image)
        most = int(units_per_row.max()) if len(images) else 0
        self.real = torch.arange(most, device=device) < units_per_row[:, None]  # (N, U)
        self.mask: torch.Tensor | None = None  # (N, U, 1, H, W): pixels of a real unit that are not padding
        if pixel_attention_mask is not None and pixel_values.dim() == 5:
            mask = pixel_attention_mask[:, :most].bool().to(device)[:, :, None]
            if not mask[self.real].all():
                self.mask = mask & self.real[:, :, None, None, None]

    @property
    def ragged(self) -> bool:
        """Whether some elements of the units are padding."""
        return self.mask is not None or not bool(self.real.all())

    def free(self, row: int) -> torch.Tensor:
        """(U, 1, h, w) or (U, 1, 1, 1) bool: the pixels of this row that an attack may move."""
        return self.real[row][:, None, None, None] if self.mask is None else self.mask[row]

    def only(self, units: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """`units` with the padding set to zero."""
        if not self.ragged:
            return units
        free = self.real[:, :, None, None, None] if self.mask is None else self.mask
        return torch.where(free if rows is None else free[rows], units, 0.0)

    def unpack(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` to units (N, U, C, h, w), zero-padded at the end.

        Raises:
            ValueError: temporal copies of a patch that differ, which are frames of a video.
        """
        units = pixel_values
        if self.patches is not None:
            size, temporal, _ = self.patches
            copies = pixel_values.reshape(len(pixel_values), self.channels, temporal, size, size)
            if ((copies != copies[:, :, :1]) & copies.isfinite()).any():
                raise ValueError(
                    "temporal copies of a patch differ: these are frames of a video, and only images are read"
                )
            units = copies[:, :, 0]
        elif self.tiles:
            units = pixel_values[self._tile_is_real(self.units_per_image)]
        padded = units.new_zeros(*self.real.shape, *units.shape[1:])
        padded[self.real] = units
        return padded

    def check(self, units: torch.Tensor, rows: int | None = None) -> None:
        """Raises ValueError if these are not units of this batch, or of `rows` rows of it."""
        expected = (len(self.real) if rows is None else rows, self.real.shape[1])
        if units.dim() != 5 or tuple(units.shape[:2]) != expected:
            raise ValueError(
                f"images have shape {tuple(units.shape)}; this batch has samples of up to {expected[1]} images, tiles "
                f"or patches, ({expected[0]}, {expected[1]}, C, h, w). Take them from Victim.pixels()"
            )

    def split(self, units: torch.Tensor) -> list[torch.Tensor]:
        """Units (N, U, C, h, w) to one tensor (own units, C, own h, own w) per sample, without padding."""
        self.check(units)
        parts = [u[own] for u, own in zip(units, self.real, strict=True)]
        if self.mask is not None:
            there = self.mask.flatten(1, 2).any(1)  # (N, H, W)
            sizes = zip(there.any(2).sum(1).tolist(), there.any(1).sum(1).tolist(), strict=True)
            parts = [part[..., :h, :w] for part, (h, w) in zip(parts, sizes, strict=True)]
        return parts

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The reverse of `split`, for samples of this batch however they were batched: units (N, U, C, h, w).

        Raises:
            ValueError: a sample has more or fewer units here.
        """
        expected, given = self.real.sum(1).tolist(), [len(part) for part in parts]
        if given != expected or len({part.shape[1] for part in parts}) > 1:
            raise ValueError(
                f"the images have {given} tiles or patches per sample; these samples have {expected}. Images "
                "made on one model fit another only if its processor cuts them in the same way"
            )
        height, width = (max(part.shape[k] for part in parts) for k in (-2, -1))
        if self.mask is not None:
            height, width = self.mask.shape[-2:]
        joined = parts[0].new_zeros(*self.real.shape, parts[0].shape[1], height, width, device=self.real.device)
        for row, part in zip(joined, parts, strict=True):
            row[: len(part), :, : part.shape[-2], : part.shape[-1]] = part
        return joined

    def pack(self, units: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Units (n, U, C, h, w) of `rows` (None: all), in the model's input space, to their `pixel_values`."""
        real = self.real if rows is None else self.real[rows]
        self.check(units, len(real))
        if self.mask is not None:
            units = self.only(units, rows)
        own = units[real]
        if self.patches is not None:
            return own.unsqueeze(2).expand(-1, -1, self.patches.temporal, -1, -1).flatten(1)
        if not self.tiles:
            return own
        images = self.units_per_image
        if rows is not None:
            images = images[runs(self.images_per_row, rows)]
        there = self._tile_is_real(images)
        return own.new_zeros(*there.shape, *own.shape[1:]).index_put(there.nonzero(as_tuple=True), own)

    def _tile_is_real(self, units_per_image: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.tiles, device=units_per_image.device) < units_per_image[:, None]

    def images(self, units: torch.Tensor) -> list[list[np.ndarray]]:
        """Units in [0, 1] to 8-bit pictures (H, W, C), grouped by sample: each image, or each of its tiles.

        Pixels are rounded to the nearest level. Call `round_to_8bit` first: it keeps them in the ball.
        """
        levels = torch.round(self.only(units.detach()) * 255).to(torch.uint8).cpu()
        pictures = []
        for row, own in enumerate(self.real.cpu()):
            parts = list(levels[row][own])
            if self.patches is not None:
                parts = [self._merge(p, g) for p, g in self._by_image(levels[row][own], row)]
            pictures.append([p.permute(1, 2, 0).numpy() for p in parts])
        return pictures

    def coordinates(self, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, column and number of the picture (as of `images`) of each pixel of `units` (N, U, C, h, w), in the order
        of their elements without channels: (N, U * h * w) int64 each. The number of padding is -1."""
        n, u, _, h, w = units.shape
        y = torch.arange(h)[:, None].expand(n, u, h, w).clone()
        x = torch.arange(w).expand(n, u, h, w).clone()
        number = torch.arange(u)[:, None, None].expand(n, u, h, w).clone()
        if self.patches is not None:
            size = self.patches.size
            for row in range(n):
                at = 0
                for k, (rows, columns) in enumerate(self._grids_of(row)):
                    own = torch.stack(
                        torch.meshgrid(torch.arange(rows * size), torch.arange(columns * size), indexing="ij")
                    )
                    cut = self._cut(torch.cat([own, torch.full_like(own[:1], k)]), (rows, columns))
                    y[row, at : at + len(cut)], x[row, at : at + len(cut)] = cut[:, 0], cut[:, 1]
                    number[row, at : at + len(cut)] = k
                    at += len(cut)
        free = self.real[:, :, None, None, None] if self.mask is None else self.mask
        number = torch.where(free[:, :, 0].cpu(), number, -1)
        return y.flatten(1), x.flatten(1), number.flatten(1)

    def from_images(self, pictures: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
        """Pictures as from `images` back to units (N, U, C, h, w) in [0, 1], float32."""
        packed = []
        for row, own in enumerate(pictures):
            parts = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in own]
            if self.patches is not None:
                packed += [self._cut(p, g) for p, g in zip(parts, self._grids_of(row), strict=True)]
            elif parts:
                packed.append(torch.stack(parts))
        units = torch.cat(packed).to(self.real.device).float() / 255
        padded = units.new_zeros(*self.real.shape, *units.shape[1:])
        padded[self.real] = units
        return padded

    def _grids_of(self, row: int) -> list[tuple[int, int]]:
        assert self.grids is not None
        start = int(self.images_per_row[:row].sum())
        return [(int(h), int(w)) for _, h, w in self.grids[start : start + int(self.images_per_row[row])].tolist()]

    def _by_image(self, units: torch.Tensor, row: int) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        grids = self._grids_of(row)
        return list(zip(units.split([h * w for h, w in grids]), grids, strict=True))

    def _merge(self, units: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Patches (h * w, C, p, p) in the processor's order to an image (C, h * p, w * p)."""
        assert self.patches is not None
        (h, w), (p, _, m) = grid, self.patches
        blocks = units.reshape(h // m, w // m, m, m, self.channels, p, p)
        return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(self.channels, h * p, w * p)

    def _cut(self, image: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        assert self.patches is not None
        (h, w), (p, _, m) = grid, self.patches
        blocks = image.reshape(len(image), h // m, m, p, w // m, m, p)
        return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(h * w, len(image), p, p)


def runs(lengths: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Indices of the items of `rows`, where row i has `lengths[i]` items and the rows are concatenated."""
    starts = (lengths.cumsum(0) - lengths)[rows].tolist()
    parts = [torch.arange(s, s + n) for s, n in zip(starts, lengths[rows].tolist(), strict=True)]
    return torch.cat([torch.arange(0), *parts]).to(lengths.device)
