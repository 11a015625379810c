"""Projection heads P_v and P_t: S_c = cos(P_v(h_v), P_t(h_t)), how well an image and a text with its answer agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmai_fast import ops
from cmai_fast.cmcv.calibration import Threshold
from cmai_fast.cmcv.saved import AGAIN, read_record, read_weights, write_pair
from cmai_fast.generation import Generation

FORMAT = 2
WEIGHTS, RECORD = "heads.safetensors", "cmcv.json"
_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP (Radford et al., 2021), section 2.5


class ImageSide(nn.Module):
    """What heads and verifiers have in common: the image's side of the shared space, and the temperature.

    Each image token passes a hidden layer before the mean is taken (Deep Sets, Zaheer et al., 2017), so that an object
    that fills one token out of many is not averaged away first.
    """

    def __init__(self, settings: dict[str, int], scale: float) -> None:
        super().__init__()
        self.settings = settings
        for name, value in settings.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        image_dim, hidden = settings["image_dim"], settings["hidden"]
        self.image_tokens = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, hidden), nn.GELU())
        self.image_out = nn.Linear(hidden, settings["dim"])
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Tensor:
        """1 / temperature, 0-d, at most 100; differentiable."""
        return self.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()

    def project_image(self, image_features: Tensor, tokens: Tensor | None = None) -> Tensor:
        """h_v (N, T, image_dim), any float dtype -> (N, dim) in the parameters' dtype, not normalised.

        `tokens` (N,), as `Bridge.image_tokens`: how many of each row's T tokens are not padding; None: all.
        """
        self._check(image_features, 3, "image_dim", "(N, T, image_dim)")
        hidden = self.image_tokens(image_features.to(self.logit_scale.dtype))
        if tokens is None:
            return self.image_out(hidden.mean(1))
        real = torch.arange(hidden.shape[1], device=hidden.device) < tokens[:, None]
        return self.image_out((hidden * real[:, :, None]).sum(1) / tokens[:, None].clamp_min(1))

    def _check(self, features: Tensor, rank: int, width: str, shape: str) -> None:
        if features.dim() != rank or features.shape[-1] != self.settings[width]:
            raise ValueError(
                f"features of shape {tuple(features.shape)}; {type(self).__name__} expects {shape} with {width} "
                f"{self.settings[width]}. Use it with the model that it was trained with"
            )


class ConsistencyHeads(ImageSide):
    """Two small networks that project into a shared space of `dim` dimensions, and their training temperature.

    Args:
        image_dim: width of h_v, as `Bridge.image_dim`.
        text_dim: width of h_t, as `Bridge.text_dim`.
        dim: width of the shared space.
        hidden: width of the hidden layers.
    """

    def __init__(self, image_dim: int, text_dim: int, dim: int = 128, hidden: int = 256) -> None:
        super().__init__({"image_dim": image_dim, "text_dim": text_dim, "dim": dim, "hidden": hidden}, 1 / 0.07)
        self.text = nn.Sequential(
            nn.LayerNorm(text_dim), nn.Linear(text_dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def project_text(self, text_features: Tensor) -> Tensor:
        """h_t (N, text_dim), any float dtype -> (N, dim) in the heads' dtype, not normalised."""
        self._check(text_features, 2, "text_dim", "(N, text_dim)")
        return self.text(text_features.to(self.logit_scale.dtype))

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """S_c (N,) in [-1, 1] of two projections (N, dim); 0 where one of them is zero."""
        return ops.cosine_heads(image.unsqueeze(1), text.unsqueeze(1)).squeeze(1)

    def save_pretrained(self, folder: str | Path, threshold: Threshold | None = None) -> None:
        """Writes heads.safetensors and cmcv.json (settings, threshold); see `cmcv.saved`."""
        record = {"format": FORMAT, **self.settings, "threshold": threshold.to_dict() if threshold else None}
        write_pair(folder, WEIGHTS, RECORD, self.state_dict(), record)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> tuple[ConsistencyHeads, Threshold | None]:
        """The heads of `folder`, on the CPU and in evaluation mode, and their threshold if one was saved.

        Raises:
            ValueError: a file is missing or damaged, or the two do not belong together.
        """
        place = Path(folder) / RECORD
        record = read_record(folder, WEIGHTS, RECORD, "ConsistencyHeads.save_pretrained, such as the cmcv/ of a run")
        try:
            later = record["format"] not in (1, FORMAT)
            settings = {k: record[k] for k in ("image_dim", "text_dim", "dim", "hidden")}
            threshold = None if later else _threshold(record)
            digest = record["sha256"]
            heads = cls(**settings)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{place} is damaged ({error!r}); {AGAIN}") from error
        if later:
            raise ValueError(
                f"{place} has format {record['format']!r}, and this version reads 1 and {FORMAT}; upgrade cmai-fast, "
                f"or {AGAIN}"
            )
        try:
            # In the precision of the file.
            heads.load_state_dict(read_weights(folder, WEIGHTS, RECORD, digest), assign=True)
        except RuntimeError as error:
            raise ValueError(f"{Path(folder) / WEIGHTS} does not fit {RECORD} ({error}); {AGAIN}") from error
        return heads.eval(), threshold


def _threshold(record: dict[str, Any]) -> Threshold | None:
    saved = record["threshold"]
    if saved and record["format"] == 1:  # always 8 tokens then, and not stored
        saved = {**saved, "generation": Generation(max_new_tokens=8).to_dict()}
    return Threshold.from_dict(saved) if saved else None
