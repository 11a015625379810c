"""V_verify: a small network that says how well an image agrees with each of several answers to a question."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cmai_fast import ops

_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP (Radford et al., 2021), section 2.5


class VerifyNetwork(nn.Module):
    """The question's words look at the image's tokens; what they find is compared with each answer, by the cosine.

    Words come in as the language model's input embeddings, so that the network costs no pass of the language model and
    nothing that it reads of the text depends on the image.

    Args:
        image_dim: width of the image features (h_v).
        text_dim: width of the input embeddings.
        width: of the network's own layers, an even multiple of `heads`.
        dim: of the space in which image and answer are compared.
        heads: of the attention.
        layers: how often the question looks at the image.
    """

    def __init__(
        self, image_dim: int, text_dim: int, width: int = 128, dim: int = 128, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.settings = {
            "image_dim": image_dim, "text_dim": text_dim, "width": width, "dim": dim, "heads": heads, "layers": layers,
        }  # fmt: skip
        for name, value in self.settings.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if width % (2 * heads):
            raise ValueError(f"width is {width}; expected a multiple of {2 * heads}, twice the number of heads")
        layer: dict[str, Any] = {
            "d_model": width, "nhead": heads, "dim_feedforward": 2 * width, "dropout": 0.0, "activation": "gelu",
            "batch_first": True, "norm_first": True,
        }  # fmt: skip
        self.read_image = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, width))
        self.read_text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.text = nn.TransformerEncoderLayer(**layer)
        self.look = nn.ModuleList([nn.TransformerDecoderLayer(**layer) for _ in range(layers)])
        self.image_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.answer_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @property
    def scale(self) -> Tensor:
        """1 / temperature, 0-d, at most 100; differentiable."""
        return self.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()

    def words(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Input embeddings (N, L, text_dim) of texts, and which are no padding (N, L), to states (N, L, width)."""
        self._check(embeddings, "text_dim", "(N, L, text_dim)")
        read = self.read_text(embeddings.to(self.logit_scale.dtype))
        return self.text(read + _positions(read), src_key_padding_mask=~mask)

    def see(self, features: Tensor, question: Tensor, mask: Tensor, tokens: Tensor | None = None) -> Tensor:
        """What the question (N, L, width), (N, L) of `words` finds in the image features (N, T, image_dim): (N, dim).

        tokens: (N,), how many of each row's T tokens are no padding; None: all.
        """
        self._check(features, "image_dim", "(N, T, image_dim)")
        image = self.read_image(features.to(self.logit_scale.dtype))
        padding = None
        if tokens is not None:
            # A row without any image still needs something to look at.
            padding = torch.arange(image.shape[1], device=image.device) >= tokens.clamp_min(1)[:, None]
        for look in self.look:
            question = look(question, image, tgt_key_padding_mask=~mask, memory_key_padding_mask=padding)
        return self.image_out(_mean(question, mask))

    def answers(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Input embeddings (M, L, text_dim) of answers to (M, dim)."""
        return self.answer_out(_mean(self.words(embeddings, mask), mask))

    def cosine(self, image: Tensor, answers: Tensor) -> Tensor:
        """S_c (N, K) in [-1, 1] of (N, dim) and the answers (N, K, dim) of each row."""
        return ops.cosine_heads(image.unsqueeze(1).expand(answers.shape).contiguous(), answers)

    def _check(self, given: Tensor, width: str, shape: str) -> None:
        if given.dim() != 3 or given.shape[-1] != self.settings[width]:
            raise ValueError(
                f"features of shape {tuple(given.shape)}; this network expects {shape} with {width} "
                f"{self.settings[width]}. Use a verifier with the model that it was calibrated for"
            )


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    kept = mask[..., None].to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1)


def _positions(like: Tensor) -> Tensor:
    """Sines and cosines (L, width) of each position (Vaswani et al., 2017, section 3.5)."""
    length, width = like.shape[1:]
    place = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(1e4) / width))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], 1).to(like.dtype)
