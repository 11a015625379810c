"""Vision encoders by name, such as CLIP's, SigLIP's or DINOv2: their weights, and how they read a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
)

from cmai_fast.models.loading import read_config, reason
from cmai_fast.pixels import PixelSpace

_RESAMPLES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# Of a config: where it came from, and what a classifier says.
_NOT_SAVED = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")


@dataclass(frozen=True)
class Reading:
    """How an encoder reads a picture: all of it is resized to `size` (height, width), then normalised.

    resample: `bilinear` or `bicubic`. mean, std: of three channels, in the [0, 1] range.
    """

    size: tuple[int, int]
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(type(n) is not int or n < 1 for n in self.size):
            raise ValueError(f"size is {self.size!r}; expected height and width in pixels")
        if self.resample not in _RESAMPLES.values():
            raise ValueError(f"resample is {self.resample!r}; expected {' or '.join(_RESAMPLES.values())}")
        PixelSpace(self.mean, self.std)

    @classmethod
    def from_processor(cls, images: Any, image_size: Any = None) -> Reading:
        """Of an image processor of `transformers`.

        An encoder whose processor resizes to 256 and cuts out the middle 224 reads the whole picture at 224: a margin
        that is cut off would be seen by the model and not by its verifier.

        Args:
            image_size: of the encoder's config, where the processor does not resize.

        Raises:
            ValueError: no size, another way of resizing, or other numbers than mean and std of three channels.
        """
        space = PixelSpace.from_processor(images)
        if len(space.mean) != 3:
            raise ValueError(f"image_mean has {len(space.mean)} channels; expected three, red, green and blue")
        given: Any = getattr(images, "crop_size" if getattr(images, "do_center_crop", False) else "size", None)
        if not getattr(images, "do_resize", True):
            given = image_size
        size = _sides(given)
        if size is None:
            raise ValueError(
                f"{type(images).__name__} and the config name no size of the images (found {given!r}); set size to "
                "{'height': ..., 'width': ...} in its preprocessor_config.json"
            )
        number = int(getattr(images, "resample", 3) or 0)
        if number not in _RESAMPLES:
            raise ValueError(
                f"resample is {number}; expected 2 (bilinear) or 3 (bicubic). Set it in preprocessor_config.json"
            )
        return cls(size, _RESAMPLES[number], tuple(space.mean.tolist()), tuple(space.std.tolist()))

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        mean, std = tuple(map(float, values["mean"])), tuple(map(float, values["std"]))
        return cls(tuple(values["size"]), values["resample"], mean, std)


def is_image_text_model(name: str | Path) -> bool:
    """Whether the folder or repository holds an image-text model, else a vision encoder; reads its config alone.

    Raises:
        ValueError: no such model, or neither of the two.
    """
    _, config = read_config(name)
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return True
    _kind(name, config)
    return False


def load_encoder(name: str | Path, device: Any = "cpu", dtype: Any = torch.float32) -> tuple[Any, Reading]:
    """(encoder, how it reads a picture), in evaluation mode and frozen; of a dual encoder (CLIP), its vision side.

    Args:
        name: as for `models.resolve`: a folder, or an id of the hub.

    Raises:
        ValueError: no such model, not a vision encoder, no image processor, weights that are incomplete, damaged or not
            safetensors, or no features of patches.
    """
    where, config = read_config(name)
    kind = _kind(name, config)
    refused = f"cannot load the encoder {str(name)!r}: "
    try:
        images = AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"{refused}it has no image processor that can be read ({reason(where, error)}), so its size and "
            "normalisation are unknown; save the encoder's own there (save_pretrained, preprocessor_config.json)"
        ) from error
    try:
        reading = Reading.from_processor(images, getattr(_vision(config), "image_size", None))
        # What a checkpoint lacks starts at random; a seed makes the file of a verifier the same every time.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder, report = kind.from_pretrained(where, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"{refused}{reason(where, error)}") from error
    encoder = encoder.to(device).eval().requires_grad_(False)
    if missing := _used(encoder, reading, set(report["missing_keys"]), refused):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{refused}it lacks the weights {missing[:3]}{more}")
    return encoder, reading


def config_of(encoder: Any) -> dict[str, Any]:
    """What `encoder_from` needs to build an encoder of this kind and size again, for a JSON file."""
    found = {k: v for k, v in encoder.config.to_dict().items() if k not in _NOT_SAVED}
    return {**found, "model_type": encoder.config.model_type}


def encoder_from(config: Mapping[str, Any], weights: Mapping[str, Tensor], device: Any, dtype: Any) -> Any:
    """An encoder of `config_of` with these weights, in evaluation mode and frozen; needs neither files nor a network.

    Raises:
        ValueError: not such a config.
        RuntimeError: weights of other names or shapes.
    """
    values = dict(config)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {kind!r}, which this version of transformers does not know")
    found = AutoConfig.for_model(kind, **values)
    _kind(kind, found)
    with torch.random.fork_rng():
        encoder = AutoModel.from_config(found, dtype=dtype)
    encoder.load_state_dict(weights)
    return encoder.to(device).eval().requires_grad_(False)


def patch_tokens(encoder: Any, pixel_values: Tensor) -> Tensor:
    """The encoder's last hidden states (N, T, D) of the patches of normalised images (N, 3, H, W), differentiable.

    Tokens of a class and registers, which precede those of the patches, are left out.

    Raises:
        ValueError: the encoder has no such states.
    """
    states = getattr(encoder(pixel_values=pixel_values, return_dict=True), "last_hidden_state", None)
    if states is None or states.dim() != 3:
        shape = None if states is None else tuple(states.shape)
        raise ValueError(
            f"last_hidden_state of {type(encoder).__name__} has shape {shape}; expected (N, T, D), a token per patch, "
            "such as that of a vision transformer"
        )
    patch = _sides(getattr(encoder.config, "patch_size", None))
    if patch is None:
        return states
    patches = (pixel_values.shape[-2] // patch[0]) * (pixel_values.shape[-1] // patch[1])
    return states[:, -patches:] if 0 < patches < states.shape[1] else states


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def _kind(name: str | Path, config: Any) -> Any:
    """The class of `transformers` that is the vision encoder of this config."""
    vision = _vision(config)
    kind = MODEL_MAPPING.get(type(vision), None)
    if getattr(kind, "main_input_name", None) != "pixel_values":
        raise ValueError(
            f"{str(name)!r} holds a {type(config).__name__} (model_type {config.model_type!r}), which is neither an "
            "image-text model nor a vision encoder of transformers; expected one such as CLIPVisionModel, "
            "SiglipVisionModel, Dinov2Model or ViTModel"
        )
    return kind


def _used(encoder: Any, reading: Reading, names: set[str], refused: str) -> list[str]:
    """Those of these parameters that the features depend on: a pooler that a checkpoint lacks is not used.

    Raises:
        ValueError: the encoder does not read pictures of this kind.
    """
    own = {k: p for k, p in encoder.named_parameters() if k in names}
    try:
        for p in own.values():
            p.requires_grad_(True)
        with torch.set_grad_enabled(bool(own)):
            blank = torch.zeros(1, 3, *reading.size, device=encoder.device, dtype=encoder.dtype)
            tokens = patch_tokens(encoder, blank)
        if not own or not tokens.requires_grad:
            return []
        found = torch.autograd.grad(tokens.sum(), list(own.values()), allow_unused=True)
        return sorted(k for k, gradient in zip(own, found, strict=True) if gradient is not None)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{refused}{type(encoder).__name__} does not read pictures of {reading.size[0]} x {reading.size[1]} as its "
            f"image processor makes them ({error})"
        ) from error
    finally:
        for p in own.values():
            p.requires_grad_(False)


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width of a number, a pair, or a size of an image processor; None if it has none."""
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, (list, tuple)):
        return (int(size[0]), int(size[1])) if len(size) == 2 else None
    if size is None:
        return None
    found = dict(size)
    edge = found.get("shortest_edge")
    height, width = found.get("height", edge), found.get("width", edge)
    return None if height is None or width is None else (int(height), int(width))
