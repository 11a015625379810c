"""The images of one batch in three forms: for attacks, for the model, and as 8-bit pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cmai_fast.bridge.graphs import EncoderGraphs
from cmai_fast.bridge.protocol import ModelBridge
from cmai_fast.layout import Layout
from cmai_fast.pixels import PixelSpace

TEXT_KEYS = ("input_ids", "attention_mask", "labels")


class BatchImages:
    """The images of a batch for attacks, and the batch with other images in their place.

    Images are (N, C, H, W) if a sample is one image, or units (N, U, C, h, w) of `layout` if it has several images,
    tiles or patches. `pixels` returns those of the batch, and `inputs` turns others into the inputs of the model's own
    forward.

    Args:
        bridge: of the model, from `bridge_of`.
        space: pixels in [0, 1] to the model's input.
        batch: what the model's own forward takes; at least `bridge.needs` (for a generative model `input_ids`,
            `attention_mask`, `labels`, each (N, L)). Other keys are ignored.

    Attributes:
        graphs: where the vision side is captured as CUDA graphs, for images whose gradient is asked for; None: nowhere.

    Raises:
        ValueError: a key of the batch is missing or has another shape.
    """

    graphs: EncoderGraphs | None = None
    _graph: Callable[[Tensor], Tensor] | None = None

    def __init__(self, bridge: ModelBridge, space: PixelSpace, batch: Mapping[str, Tensor]) -> None:
        missing = [k for k in bridge.needs if k not in batch]
        if missing:
            raise ValueError(f"the batch has no {', no '.join(missing)}; an attack needs {', '.join(bridge.needs)}")
        self.bridge, self.space = bridge, space
        self._pixel_values = batch.get("pixel_values")
        self.batch: Mapping[str, Tensor]
        self._image, self.batch = bridge.inputs(batch)
        if bridge.needs == TEXT_KEYS and len({self.batch[k].shape for k in TEXT_KEYS}) > 1:
            shapes = ", ".join(f"{k} {tuple(self.batch[k].shape)}" for k in TEXT_KEYS)
            raise ValueError(f"the batch has {shapes}; expected one shape (N, L) for all three")

    def __len__(self) -> int:
        return len(self.batch["labels"])

    @cached_property
    def layout(self) -> Layout | None:
        """Where each sample's pixels lie in the batch's `pixel_values`; None: a sample is one image (C, H, W)."""
        values = self._pixel_values
        if values is None:
            return None
        if values.dim() not in (2, 4, 5):
            return Layout(values)  # raises the error
        images = None
        if values.dim() != 5 or "image_sizes" in self.bridge.image_keys:  # else grouped by sample already
            images = self.bridge.images_per_row(values, **self._image)
            if values.dim() == 4 and bool((images == 1).all()):
                return None
        mask = self._image.get("pixel_attention_mask")
        if values.dim() == 5 and mask is None and not self.space.mean.any():
            raise ValueError(
                "the processor's mean is 0, so a black tile looks like zero padding, and would not be attacked; "
                "expected a mean above 0, or a batch with pixel_attention_mask"
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
        """Images in [0, 1] as 8-bit pictures (H, W, C): for each sample, its images (or their tiles)."""
        layout = Layout(pixels) if self.layout is None else self.layout
        return layout.images(pixels.unsqueeze(1) if self.layout is None else pixels)

    def from_pictures(self, pictures: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """The reverse of `pictures`: images in [0, 1], as attacks take them."""
        if self.layout is not None:
            return self.layout.from_images(pictures)
        return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for (p,) in pictures])

    def split(self, pixels: Tensor) -> list[Tensor]:
        """Images as attacks take them, as one tensor per sample: its own images, tiles or patches (u, C, h, w)."""
        return list(pixels.unsqueeze(1)) if self.layout is None else self.layout.split(pixels)

    def join(self, images: Sequence[Tensor]) -> Tensor:
        """The reverse of `split`, for images of this batch's samples; they may come from batches of other samples.

        Raises:
            ValueError: images of other shapes than this batch's model takes.
        """
        if self._pixel_values is None:
            raise ValueError("the batch has no pixel_values; expected those that the model's processor made")
        if self.layout is not None:
            return self.layout.join(images)
        expected, given = [(1, *value.shape) for value in self._pixel_values], [tuple(image.shape) for image in images]
        if given != expected:
            raise ValueError(
                f"{len(given)} samples have images of shapes {sorted(set(given))}, and this model reads "
                f"{len(expected)} of {sorted(set(expected))}; images made on one model fit another only if both "
                "read images in the same way"
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
        if self.layout is None and set(self._image) <= {"input_ids"}:  # one image per sample: nothing to assign
            if self.graphs is not None and rows is None and model_input.requires_grad:
                self._graph = self._graph or self.graphs.of(self.bridge, model_input)
                return self._graph(model_input)
            return self.bridge.encode_image(model_input)
        return self.bridge.encode_image(self._pack(model_input, rows), **self.rows(self._image, rows))
