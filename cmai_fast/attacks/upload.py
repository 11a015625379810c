"""The victim whose pixels are those of the uploaded pictures, before the processor resizes, crops and tiles them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cmai_fast.attacks.victim import Victim
from cmai_fast.bridge import BatchImages, ModelBridge
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import Sample
from cmai_fast.data.collators import Collator
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sample import differing
from cmai_fast.layout import Layout
from cmai_fast.pixels import PixelSpace, levels
from cmai_fast.preprocessing.differentiable import Route, by_route
from cmai_fast.preprocessing.jpeg import jpeg, through_jpeg
from cmai_fast.preprocessing.resampling import to_levels
from cmai_fast.preprocessing.trace import Places, Trace, numbered
from cmai_fast.threat import Surface

# A rounding that falls to the other side moves a pixel by a level, and a few of these can meet in one.
_SLACK = 4.0
_GREY = 128


class UploadVictim(Victim):
    """A batch under attack at the pictures that a person uploads: 8-bit RGB of any size, also of different sizes.

    An attack on it searches pictures, and its gradients pass through everything that the processor does. Pixels are
    rounded to 8 bits before the processor sees them, as in a saved file, with straight-through gradients, so losses and
    verdicts are those of the 8-bit picture. Round the result to it (`round_to_8bit`), and save it (`pictures`).

    Images are (N, 3, H, W) if each sample has one picture and all have the same size, else (N, K, 3, H, W),
    zero-padded to the largest, of which an attack moves only the pictures. For the surface `patch` they hold the
    squares alone.

    Args:
        bridge, space, heads: as of `Victim`; `space` is that of the processor.
        collate: of the model's family (`collator_of`).
        samples: of the batch.
        surface: `upload`, `patch` or `blank`; None: `upload`.
        batch: what `collate` makes of the samples, on the model's device, if the caller has it already.

    Raises:
        ValueError: no sample has a picture. On first use: a processor whose result is no linear map of the pixels, up
            to rounding; names it, and the deviation.
    """

    def __init__(
        self,
        bridge: ModelBridge,
        space: PixelSpace,
        collate: Collator,
        samples: Sequence[Sample],
        heads: ConsistencyHeads | None = None,
        *,
        surface: Surface | None = None,
        batch: Mapping[str, Tensor] | None = None,
    ) -> None:
        batch = collate(samples) if batch is None else batch
        super().__init__(bridge, space, batch, heads)
        self.seen, self.space = BatchImages(bridge, space, batch), PixelSpace([0.0] * 3, [1.0] * 3)
        self.samples, self.surface, self._collate = list(samples), surface or Surface("upload"), collate
        if not any(sample.images for sample in self.samples):
            raise ValueError("no sample of the batch has a picture; expected at least one to attack")
        self._own = [read(sample) for sample in self.samples]
        self._around = [[_around(own, self.surface) for own in several] for several in self._own]
        self._pixel_values, self._mask = self._padded(self._around)

    @cached_property
    def layout(self) -> Layout | None:
        values = self._pixel_values
        assert values is not None
        return None if values.dim() == 4 else Layout(values, pixel_attention_mask=self._mask)

    def encode(self, model_input: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.seen.encode(self.read(model_input, rows), rows)

    def rows(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Mapping[str, Tensor]:
        return self.seen.rows(inputs, rows)

    def read(self, model_input: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.seen.space.to_model(self.units(model_input, rows))

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.seen.inputs(self.units(pixels))

    def pictures(self, pixels: Tensor) -> list[list[np.ndarray]]:
        """Images in [0, 1] as the uploaded 8-bit pictures (H, W, 3), by sample."""
        images = pixels if pixels.dim() == 5 else pixels.unsqueeze(1)
        return [made(several, own, self.surface) for several, own in zip(images, self._own, strict=True)]

    def other_texts(self, row: int) -> tuple[str, ...]:
        """The other answers that a sample may give: its choices or, for a dual encoder, the texts to choose from."""
        sample, texts = self.samples[row], getattr(self._collate, "texts", None)
        return differing(texts or sample.choices, sample.references)

    def from_pictures(self, pictures: Sequence[Sequence[np.ndarray]]) -> Tensor:
        return self._padded(pictures)[0]

    def _padded(self, pictures: Sequence[Sequence[np.ndarray]]) -> tuple[Tensor, Tensor]:
        """What an attack changes of these pictures, (N, 3, H, W) or (N, K, 3, H, W), and a mask of no padding."""
        cut = [[picture[_place(picture, self.surface)] for picture in several] for several in pictures]
        height, width = (max(p.shape[k] for several in cut for p in several) for k in (0, 1))
        values = torch.zeros(len(cut), max(map(len, cut)), 3, height, width)
        mask = torch.zeros(*values.shape[:2], height, width, dtype=torch.bool)
        for row, several in enumerate(cut):
            for k, picture in enumerate(several):
                h, w = picture.shape[:2]
                values[row, k, :, :h, :w], mask[row, k, :h, :w] = _pixels(picture), True
        values = values.squeeze(1) if values.shape[1] == 1 and bool(mask.all()) else values
        device = self.seen.batch["labels"].device
        return values.to(device), mask.to(device)

    def units(self, pixels: Tensor, rows: Tensor | None = None) -> Tensor:
        """Images of `rows` as attacks take them, to those that the processor makes of them, in [0, 1]."""
        batch = list(range(len(self))) if rows is None else rows.tolist()
        images = to_levels(pixels if pixels.dim() == 5 else pixels.unsqueeze(1))
        return self._processed(batch, lambda at: self._whole(images, batch, at))

    def _processed(self, rows: Sequence[int], pictures: Callable[[list[int]], list[Tensor]]) -> Tensor:
        units = by_route([self.routes[row] for row in rows], lambda route, at: route(pictures(at)))
        return units.squeeze(1) if self.seen.layout is None else units

    def _whole(self, images: Tensor, batch: Sequence[int], at: list[int]) -> list[Tensor]:
        """The uploaded pictures, each (n, 3, H, W), of `images` (N, K, 3, h, w) at the places `at`, which are alike."""
        found = []
        for k, first in enumerate(self._around[batch[at[0]]]):
            down, across = _place(first, self.surface)
            cut = images[at, k, :, : down.stop - down.start, : across.stop - across.start]
            if cut.shape[-2:] != first.shape[:2]:
                around = torch.stack([_pixels(self._around[batch[i]][k]) for i in at]).to(cut)
                around[..., down, across] = 0
                cut = around + F.pad(
                    cut, (across.start, around.shape[-1] - across.stop, down.start, around.shape[-2] - down.stop)
                )
            found.append(cut if self.surface.jpeg is None else through_jpeg(cut, self.surface.jpeg))
        return found

    @cached_property
    def routes(self) -> list[Route]:
        """What the processor makes of each sample's pictures."""
        processor = self._collate.processor.image_processor
        trace, numbers = Trace(processor), count()
        blank = [[numbered(next(numbers), own.shape[1::-1]) for own in several] for several in self._own]
        tags = (self._seen(self._collate.with_pictures_by(trace), blank) * 255).numpy()
        real = self.seen.pixels().cpu().float()
        real = real.unsqueeze(1) if self.seen.layout is None else real
        first = np.cumsum([0, *map(len, self._own)])
        routes = [
            Route(trace.nodes, Places.read(tag), filling, int(start))
            for tag, filling, start in zip(tags, real, first, strict=False)
        ]
        self._check(type(processor).__name__, routes)
        return routes

    def _seen(self, collate: Collator, pictures: Sequence[Sequence[Any]]) -> Tensor:
        """(N, U, 3, h, w): what the processor makes of these pictures of the samples, undone the normalisation."""
        asked = [replace(s, images=tuple(several)) for s, several in zip(self.samples, pictures, strict=True)]
        made, layout = collate(asked)["pixel_values"].double(), self.seen.layout
        units = made.unsqueeze(1) if layout is None else layout.unpack(made.to(layout.real.device)).cpu()
        mean, std = self.seen.space.like(units)
        units = units * std + mean
        return units if layout is None else layout.only(units.to(layout.real.device)).cpu()

    def _check(self, name: str, routes: Sequence[Route]) -> None:
        """Compares with the processor's own result for random pixels."""
        for route, several in zip(routes, self._own, strict=True):
            if several and not route.reached:
                raise ValueError(
                    f"no pixel of the uploaded pictures could be followed through {name}, which changes their colours "
                    "too; attack the model's input (--threat input)"
                )
        noise = [[np.random.default_rng(0).integers(0, 256, own.shape, np.uint8) for own in o] for o in self._own]
        pixels = [[_pixels(picture) for picture in several] for several in noise]
        alike = lambda at: [torch.stack([pixels[i][k] for i in at]) for k in range(len(pixels[at[0]]))]  # noqa: E731
        made = by_route(routes, lambda route, at: route(alike(at)))
        layout = self.seen.layout
        made = made if layout is None else layout.only(made.to(layout.real.device)).cpu()
        deviation = float((made - self._seen(self._collate, noise)).abs().max()) * 255
        if not deviation <= _SLACK:
            raise ValueError(
                f"what {name} makes of the uploaded pictures deviates by {deviation:.1f} of 255 levels from a linear "
                "map of their pixels, so it cannot be differentiated; attack the model's input (--threat input)"
            )


def uploaded(sample: Sample, image: Tensor, surface: Surface) -> Sample:
    """The sample with pictures of an attack on this surface, (K, 3, H, W) in [0, 1] as `split` gives them, in the place
    of its own: 8 bits, as the processor reads them."""
    pictures = made(image, read(sample), surface)
    if surface.jpeg is not None:
        pictures = [jpeg(picture, surface.jpeg) for picture in pictures]
    return replace(sample, images=tuple(map(Image.fromarray, pictures)))


def read(sample: Sample) -> list[np.ndarray]:
    """The sample's own pictures, 8-bit (H, W, 3)."""
    return [np.array(read_picture(picture, f"{sample.name}: its image")) for picture in sample.images]


def made(image: Tensor, own: Sequence[np.ndarray], surface: Surface) -> list[np.ndarray]:
    """Pictures (K, 3, H, W) of an attack, in [0, 1] and padded, at the places of the surface in the sample's own."""
    pictures = [_around(picture, surface) for picture in own]
    for picture, cut in zip(pictures, levels(image).cpu().permute(0, 2, 3, 1).numpy(), strict=False):
        down, across = _place(picture, surface)
        picture[down, across] = cut[: down.stop - down.start, : across.stop - across.start]
    return pictures


def _around(own: np.ndarray, surface: Surface) -> np.ndarray:
    """A copy of the picture before the attack."""
    return np.full_like(own, _GREY) if surface.name == "blank" else own.copy()


def _place(picture: np.ndarray, surface: Surface) -> tuple[slice, slice]:
    """The rows and columns that an attack changes."""
    height, width = picture.shape[:2]
    if surface.name != "patch":
        return slice(0, height), slice(0, width)
    side = max(1, round(surface.size * min(height, width)))
    top, left = round(surface.y * (height - side)), round(surface.x * (width - side))
    return slice(top, top + side), slice(left, left + side)


def _pixels(picture: np.ndarray) -> Tensor:
    """(H, W, 3) to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
