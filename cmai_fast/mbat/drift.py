"""How far image features are from where they were before training, which a copy of the vision side knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cmai_fast.bridge import ModelBridge, bridge_of, frozen
from cmai_fast.cmcv.tower import beside


def squared_distance(features: Tensor, target: Tensor) -> Tensor:
    """||h - t||^2 / ||t||^2 per sample (n,), float32, of h and t (n, T, D)."""
    features, target = (_flat(each) for each in (features, target))
    return (features - target).square().sum(1) / target.square().sum(1).clamp_min(torch.finfo(target.dtype).tiny)


def cosine_distance(features: Tensor, target: Tensor) -> Tensor:
    """1 - cos(h, t) per sample (n,), float32, of h and t (n, T, D)."""
    return 1 - F.cosine_similarity(_flat(features), _flat(target), dim=1)


def _flat(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32)).flatten(1)


class Original:
    """A copy of a vision side. It is not part of checkpoints: a run resumes with the model that it began with."""

    def __init__(self, bridge: ModelBridge) -> None:
        self._bridge, theirs = bridge_of(beside(bridge)), {id(part) for part in bridge.model.modules()}
        self._copied = [part for part in self._bridge.model.modules() if id(part) not in theirs]

    def to(self, device: torch.device) -> None:
        """Moves what was copied, also outside of `vision_side`, such as queries and row separators."""
        for part in self._copied:
            part._apply(lambda tensor: tensor.to(device), recurse=False)

    def features(self, pixel_values: Tensor, image: dict[str, Tensor]) -> Tensor:
        """h_v (N, T, D) as it was, no gradient."""
        with frozen(self._bridge.model), torch.no_grad():
            return self._bridge.encode_image(pixel_values, **image)
