"""The image tower of `photo-dual-encoder`: EfficientNet-lite (Tan and Le, 2019; no squeeze-excitation, ReLU6).

Written out here, so that a saved model needs no package besides this one, and so that tests can build a tiny one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig


class LiteTowerConfig(PreTrainedConfig):
    """The sizes of a tower; the default is EfficientNet-lite0 on pictures of 128 x 128.

    Attributes:
        image_size: height and width of a picture, in pixels.
        stem_width: channels after the first convolution, which halves the picture.
        stages: one list [blocks, kernel size, stride of the first block, expansion, channels] per stage.
        hidden_size: channels after the last convolution, whose mean over all places is the picture's feature.
    """

    model_type = "efficientnet-lite"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 128,
        stem_width: int = 32,
        stages: tuple[tuple[int, ...], ...] = (
            (1, 3, 1, 1, 16),
            (2, 3, 2, 6, 24),
            (2, 5, 2, 6, 40),
            (3, 3, 2, 6, 80),
            (3, 5, 1, 6, 112),
            (4, 5, 2, 6, 192),
            (1, 3, 1, 6, 320),
        ),
        hidden_size: int = 1280,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.stem_width = stem_width
        self.stages = [list(stage) for stage in stages]
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class LiteTower(nn.Module):
    """Pictures (N, 3, H, W) to features (N, hidden_size): the mean of the last map over all places."""

    def __init__(self, config: LiteTowerConfig) -> None:
        super().__init__()
        width = config.stem_width
        self.stem = _ConvNorm(3, width, kernel=3, stride=2)
        blocks = []
        for repeats, kernel, stride, expansion, channels in config.stages:
            for i in range(repeats):
                blocks.append(_Block(width, channels, kernel, stride if i == 0 else 1, expansion))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.top = _ConvNorm(width, config.hidden_size, kernel=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # Depthwise convolutions on a CPU: at 128 x 128, a forward and backward pass takes 37 ms instead of 72.
        x = pixel_values.to(self.stem.conv.weight.dtype, memory_format=torch.channels_last)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.top(x).mean((2, 3))


class _Block(nn.Module):
    """An inverted bottleneck: expand, filter each channel, project; the input is added where the shape allows it."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = _ConvNorm(width, inner, kernel=1) if expansion != 1 else None
        self.depthwise = _ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = _ConvNorm(inner, channels, kernel=1, activated=False)
        self.adds = stride == 1 and width == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x if self.expand is None else self.expand(x)
        made = self.project(self.depthwise(inner))
        return made + x if self.adds else made


class _ConvNorm(nn.Module):
    """Convolution, normalisation and ReLU6."""

    def __init__(
        self, width: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, activated: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, channels, kernel, stride, groups=groups, bias=False)
        self.norm = _FixedNorm(channels, eps=1e-3)
        self.activated = activated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (k, *_), (s, *_) = self.conv.kernel_size, self.conv.stride
        # TensorFlow's "same": an odd pixel of padding is at the right and at the bottom.
        high, wide = (max((-(-side // s) - 1) * s + k - side, 0) for side in x.shape[-2:])
        if high or wide:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.activated else x


class _FixedNorm(nn.BatchNorm2d):
    """Keeps the mean and variance of the checkpoint, also in training: scale and shift learn, the statistics do not.

    A batch of attacked pictures has other statistics than the clean ones that the model will meet, and a result would
    depend on the rest of its batch.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def of_package(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of `efficientnet-lite-pytorch`, under the names that `LiteTower` has; without those of its classifier."""
    parts = {
        "_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "top.conv", "_bn1": "top.norm",
    }  # fmt: skip
    inner = {
        "_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm",
    }  # fmt: skip
    named = {}
    for name, value in weights.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            place, part, *end = rest
            named[".".join(["blocks", place, inner[part], *end])] = value
        elif first in parts:
            named[".".join([parts[first], *rest])] = value
    return named
