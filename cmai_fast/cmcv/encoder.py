"""A vision encoder of another architecture beside a model: it reads the very picture that the model reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmai_fast.bridge import ModelBridge
from cmai_fast.models.encoders import Reading, config_of, encoder_from, load_encoder, patch_tokens
from cmai_fast.pixels import PixelSpace

# Inputs of a model's image side by which its pictures are tiles or flattened patches.
_IN_PARTS = ("image_sizes", "image_grid_thw", "pixel_attention_mask")


class Encoder(nn.Module):
    """Features of pictures in a model's input space, read as the encoder reads pictures.

    Args:
        encoder: of `transformers`, from `models.encoders.load_encoder`. It is frozen.
        reading: its size and normalisation.
        space: of the model beside it.

    `image_dim` is the width of its features.
    """

    def __init__(self, encoder: Any, reading: Reading, space: PixelSpace) -> None:
        super().__init__()
        self.encoder, self.reading, self.space = encoder, reading, space
        self.eval().requires_grad_(False)
        self._own = PixelSpace(reading.mean, reading.std)
        with torch.no_grad():
            blank = torch.zeros(1, 3, *reading.size, device=encoder.device, dtype=encoder.dtype)
            self.image_dim = patch_tokens(encoder, blank).shape[-1]

    @classmethod
    def load(cls, name: str | Path, bridge: ModelBridge, space: PixelSpace) -> Encoder:
        """By name, as `load_encoder`, on the device and in the precision of the model.

        Raises:
            ValueError: as `load_encoder` and `check_pictures`.
        """
        check_pictures(bridge)
        return cls(*load_encoder(name, bridge.model.device, bridge.model.dtype), space)

    def forward(self, model_input: Tensor) -> Tensor:
        """(N, 3, H, W) in the model's input space to tokens (N, T, image_dim), differentiable."""
        x = model_input.to(torch.promote_types(model_input.dtype, torch.float32))
        mean, std = self.space.like(x)
        pixels = resized(x * std + mean, self.reading.size, self.reading.resample)
        return patch_tokens(self.encoder, self._own.to_model(pixels).to(self.encoder.dtype))

    def record(self) -> dict[str, Any]:
        """All but the weights, for a JSON file; `restored` reads it."""
        model = {"mean": self.space.mean.tolist(), "std": self.space.std.tolist()}
        return {"config": config_of(self.encoder), "reading": self.reading.to_dict(), "model": model}

    @classmethod
    def restored(cls, record: Mapping[str, Any], weights: Mapping[str, Tensor], bridge: ModelBridge) -> Encoder:
        """From `record` and the weights of `encoder`, on the device and in the precision of the model.

        Raises:
            ValueError: not such a record, weights of other names or shapes, or as `check_pictures`.
        """
        check_pictures(bridge)
        try:
            reading = Reading.from_dict(record["reading"])
            space = PixelSpace(record["model"]["mean"], record["model"]["std"])
            return cls(encoder_from(record["config"], weights, bridge.model.device, bridge.model.dtype), reading, space)
        except Exception as error:  # for numbers that make no model, classes of transformers raise all kinds
            said = " ".join(str(error).split())
            raise ValueError(f"its tower does not make an encoder: {type(error).__name__}, {said}") from error


class EncoderBridge:
    """The bridge of a verifier that sees with an encoder: E_v is the encoder's, everything else the model's.

    `model` is the encoder, and there is no F: the model's language side does not take these features.
    """

    def __init__(self, bridge: ModelBridge, encoder: Encoder) -> None:
        self._of_model, self.model = bridge, encoder
        self.needs, self.image_keys, self.text_keys = bridge.needs, bridge.image_keys, bridge.text_keys
        self.image_dim, self.text_dim = encoder.image_dim, bridge.text_dim
        self.image_size, self.context = bridge.image_size, bridge.context

    @property
    def text_model(self) -> Any:
        return self._of_model.text_model

    @property
    def vision_side(self) -> list[nn.Module]:
        return [self.model]

    @property
    def vision_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._of_model.inputs(batch)

    def select(
        self, inputs: Mapping[str, Tensor], rows: Tensor, images_per_row: Tensor | None = None
    ) -> dict[str, Tensor]:
        return self._of_model.select(inputs, rows, images_per_row)

    def own_texts(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._of_model.own_texts(batch)

    def image_tokens(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """None: every picture has the same number of tokens."""
        return None

    def images_per_row(self, pixel_values: Tensor, *args: Any, **image_inputs: Any) -> Tensor:
        return self._of_model.images_per_row(pixel_values, *args, **image_inputs)

    def encode_image(self, pixel_values: Tensor, input_ids: Tensor | None = None, **image_inputs: Any) -> Tensor:
        """The model's `pixel_values` (N, 3, H, W), one picture per sample, to features (N, T, image_dim).

        Raises:
            ValueError: several pictures, tiles or patches per sample.
        """
        many = input_ids is not None and len(input_ids) != len(pixel_values)
        if pixel_values.dim() != 4 or many:
            samples = "" if input_ids is None else f" of {len(input_ids)} samples"
            raise ValueError(f"pixel_values{samples} have shape {tuple(pixel_values.shape)}; {_EXPECTED}")
        return self.model(pixel_values)

    def encode_text(self, *args: Any, **text_inputs: Any) -> Tensor:
        return self._of_model.encode_text(*args, **text_inputs)

    def fuse(self, image_features: Tensor, *args: Any, **text_inputs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(
            f"features of {type(self.model.encoder).__name__} are for the verifier, and the model takes its own; use "
            "the bridge of the model"
        )

    def losses(self, image_features: Tensor, **text_inputs: Any) -> tuple[Tensor, Tensor]:
        return self.fuse(image_features, **text_inputs)


_EXPECTED = (
    "a verifier that sees with an encoder of another architecture reads one picture (3, height, width) per sample, "
    "not in tiles or patches. Let it see with a copy of the model's own vision side (calibrate --tower copy), or with "
    "that of an immunised model of the same architecture"
)


def check_pictures(bridge: ModelBridge) -> None:
    """Raises ValueError for a model that reads pictures in tiles or patches."""
    if found := [k for k in bridge.image_keys if k in _IN_PARTS]:
        raise ValueError(f"{type(bridge.model).__name__} takes {', '.join(found)} beside its pixel_values; {_EXPECTED}")


def resized(pixels: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    """(N, C, H, W) in [0, 1] to `size`, as Pillow does it but for its rounding: antialiased, first the width, then the
    height. Differentiable; of this size, unchanged.

    Bicubic weights overshoot at edges, and Pillow cuts that off in each direction. The gradient passes as if nothing
    was cut off: rounding puts plain black and white areas a little outside [0, 1], where an attack would find none.
    """
    for sides in ((pixels.shape[-2], size[1]), size):
        if tuple(pixels.shape[-2:]) != sides:
            found = F.interpolate(pixels, sides, mode=resample, antialias=True, align_corners=False)
            pixels = found + (found.clamp(0, 1) - found).detach()
    return pixels
