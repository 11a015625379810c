"""Pixels in [0, 1] as a model's input, and as 8-bit images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cmai_fast.layout import Patches
from cmai_fast.threat import ThreatModel


class PixelSpace:
    """The affine map between pixels in [0, 1] and a model's normalised `pixel_values`, channel by channel.

    Args:
        mean, std: the processor's, one value per channel, in the [0, 1] range.
        patches: how the processor flattens images, if it does (Qwen-VL).
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], patches: Patches | None = None) -> None:
        if len(mean) != len(std) or len(mean) == 0:
            raise ValueError(f"mean has {len(mean)} channels and std {len(std)}; expected the same number, at least 1")
        if min(std) <= 0:
            raise ValueError(f"std is {list(std)}; every channel's must be above 0")
        self.mean = torch.tensor(mean, dtype=torch.float32)
        self.std = torch.tensor(std, dtype=torch.float32)
        self.patches = patches

    @classmethod
    def from_processor(cls, processor: Any) -> PixelSpace:
        """Reads mean, std and patches from a processor or an image processor of `transformers`."""
        images = getattr(processor, "image_processor", processor)
        mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
        if not getattr(images, "do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        if mean is None or std is None:
            raise ValueError(
                f"{type(images).__name__} has no image_mean and image_std, so eps cannot be expressed in the model's "
                "input space; set them, or build PixelSpace(mean, std) by hand"
            )
        scale = getattr(images, "rescale_factor", 1 / 255) if getattr(images, "do_rescale", True) else 1.0
        if abs(scale * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor is {scale}; only 1/255, which maps 8-bit images to [0, 1], is supported")
        patches = None
        if (temporal := getattr(images, "temporal_patch_size", None)) is not None:
            patches = Patches(images.patch_size, temporal, getattr(images, "merge_size", 1))
        return cls(mean, std, patches)

    def to_model(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (N, C, H, W), or units (N, U, C, h, w) of a `Layout`, from [0, 1] to the model's input space.

        Differentiable, same dtype; a layout's `pack` then makes the family's own `pixel_values`.
        """
        mean, std = self.like(pixels)
        return (pixels - mean) / std

    def to_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised `pixel_values` (N, C, H, W), or units of a `Layout`, back to [0, 1]; at least float32.

        8-bit images come back exactly on the float32 grid k/255, so that unchanged pixels compare equal.

        Raises:
            ValueError: a value that is not finite, or pixels outside [0, 1] (not normalised by this mean and std).
        """
        x = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
        mean, std = self.like(x)
        pixels = x * std + mean
        half = pixel_values.dtype in (torch.bfloat16, torch.float16)
        check_pixels(pixels, 2e-2 if half else 1e-5, "They were not normalised by this mean and std")
        grid = torch.round(pixels * 255) / 255
        pixels = torch.where((pixels - grid).abs() < 1e-5, grid, pixels)
        return pixels.clamp(0, 1)

    def like(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mean and std shaped (C, 1, 1), with the dtype and device of `pixels`."""
        if pixels.dim() not in (4, 5) or pixels.shape[-3] != len(self.mean):
            raise ValueError(
                f"images have shape {tuple(pixels.shape)}; expected (N, {len(self.mean)}, height, width) for a "
                f"processor with {len(self.mean)} channels"
            )
        return self.mean.to(pixels)[:, None, None], self.std.to(pixels)[:, None, None]


def check_pixels(
    pixels: torch.Tensor,
    slack: float = 1e-6,
    hint: str = "Normalised pixel_values go through PixelSpace.to_pixels first",
) -> None:
    """Raises ValueError if a pixel is not finite or not in [0, 1] (within `slack`); names the first such row."""
    if pixels.numel() == 0:
        return
    flat = pixels.detach().flatten(1)
    bad = ~flat.isfinite().all(1)
    outside = (flat.amin(1) < -slack) | (flat.amax(1) > 1 + slack)
    if not (bad | outside).any():  # one question to a GPU
        return
    if bad.any():
        raise ValueError(f"image {int(bad.nonzero()[0])} of the batch holds NaN or infinite pixels; expected [0, 1]")
    row = int(outside.nonzero()[0])
    raise ValueError(
        f"image {row} of the batch has pixels from {flat[row].min():.4g} to {flat[row].max():.4g}; "
        f"expected [0, 1]. {hint}"
    )


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit levels of pixels in [0, 1], uint8."""
    return torch.round(pixels.detach() * 255).to(torch.uint8)


def round_to_8bit(adv: torch.Tensor, clean: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    """The 8-bit image a user would receive: `adv` on the k/255 grid, still inside the ball and the box.

    Each pixel is rounded to the nearest level, or toward `clean` if the nearest is outside the ball (l2: as few pixels
    as possible, those closest to the lower level first). `adv` and `clean` have shape (N, ...) in [0, 1]; `clean` must
    lie on the grid itself, and `adv` in the ball.

    Raises:
        ValueError: `clean` is not an 8-bit image.
    """
    own = torch.round(clean.double() * 255)
    if not torch.allclose(own / 255, clean.double(), atol=1e-4, rtol=0):
        raise ValueError("the clean image is not on the 8-bit grid k/255, so the ball may contain no 8-bit image")
    steps = (adv.double() - own / 255) * 255
    if threat.norm == "linf":
        # 8/255 is not exact in binary: the slack makes it eight whole levels.
        most = int(threat.eps * 255 + 1e-6)
        steps = steps.round().clamp(-most, most)
    else:
        steps = _round_in_l2_ball(steps.flatten(1), threat.eps * 255).view_as(steps)
    return ((own + steps).clamp(0, 255) / 255).to(adv.dtype)


def _round_in_l2_ball(steps: torch.Tensor, radius: float) -> torch.Tensor:
    """Rows (N, D) of l2 norm at most `radius` to whole numbers: toward zero, then away while the ball has room."""
    inner = steps.trunc()
    rest = (steps - inner).abs()
    price = torch.where(rest > 0.5, 2 * inner.abs() + 1, 0.0)  # (k + 1)^2 - k^2
    order = rest.argsort(dim=1, descending=True, stable=True)
    spent = inner.square().sum(1, keepdim=True) + price.gather(1, order).cumsum(1)
    # The slack is that of the binary radius, as for linf.
    fits = torch.zeros_like(rest, dtype=torch.bool).scatter(1, order, spent <= radius**2 + 1e-6)
    return inner + torch.where(fits & (rest > 0.5), steps.sign(), 0.0)
