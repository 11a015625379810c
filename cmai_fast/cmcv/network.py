"""V_verify: a small network that says how well an image agrees with statements, each a question with an answer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cmai_fast import ops

_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP (Radford et al., 2021), section 2.5


class VerifyNetwork(nn.Module):
    """Image and statement are projected into one space and compared by the cosine, S_c.

    The words of a statement come in as the language model's input embeddings, so that the network costs no pass of the
    language model and nothing that it reads of the text depends on the image. Question and answer are read together:
    "is there a red shape? yes" and "... no" are then opposite directions. A network in which the question looks at the
    image and the answer is compared with what it finds stayed at chance on such questions for 1,500 batches.

    Each image token passes a hidden layer before the mean is taken (Deep Sets, Zaheer et al., 2017), so that an object
    that fills one token out of many is not averaged away first.

    Args:
        image_dim: width of the image features (h_v).
        text_dim: width of the input embeddings.
        hidden: of the image side.
        width: of the text side, an even multiple of `heads`.
        dim: of the space in which they are compared.
        heads: of the text side's attention.
    """

    def __init__(
        self, image_dim: int, text_dim: int, hidden: int = 256, width: int = 128, dim: int = 128, heads: int = 4
    ) -> None:
        super().__init__()
        self.settings = {
            "image_dim": image_dim, "text_dim": text_dim, "hidden": hidden, "width": width, "dim": dim, "heads": heads,
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
        self.image_tokens = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, hidden), nn.GELU())
        self.image_out = nn.Linear(hidden, dim)
        self.words = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.part = nn.Embedding(2, width)  # of the question, of the answer
        self.text = nn.TransformerEncoderLayer(**layer)
        self.text_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @property
    def scale(self) -> Tensor:
        """1 / temperature, 0-d, at most 100; differentiable."""
        return self.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()

    def image(self, features: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Image features (N, T, image_dim) to (N, dim).

        tokens: (N,), how many of each row's T tokens are no padding; None: all.
        """
        self._check(features, "image_dim", "(N, T, image_dim)")
        hidden = self.image_tokens(features.to(self.logit_scale.dtype))
        if tokens is None:
            return self.image_out(hidden.mean(1))
        real = torch.arange(hidden.shape[1], device=hidden.device) < tokens[:, None]
        return self.image_out((hidden * real[:, :, None]).sum(1) / tokens[:, None].clamp_min(1))

    def statements(self, embeddings: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
        """Statements to (M, dim).

        Args:
            embeddings: input embeddings (M, L, text_dim) of the words.
            mask: (M, L) bool, which words are no padding.
            answer: (M, L) bool, which words are the answer's; at least one per row.
        """
        self._check(embeddings, "text_dim", "(M, L, text_dim)")
        read = self.words(embeddings.to(self.logit_scale.dtype)) + self.part(answer.long())
        states = self.text(read + _positions(read), src_key_padding_mask=~mask)
        kept = answer[..., None].to(states.dtype)
        return self.text_out((states * kept).sum(1) / kept.sum(1))

    def cosine(self, image: Tensor, statements: Tensor) -> Tensor:
        """S_c (N, K) in [-1, 1] of images (N, dim) and the statements (N, K, dim) of each."""
        return ops.cosine_heads(image.unsqueeze(1).expand(statements.shape).contiguous(), statements)

    def _check(self, given: Tensor, width: str, shape: str) -> None:
        if given.dim() != 3 or given.shape[-1] != self.settings[width]:
            raise ValueError(
                f"features of shape {tuple(given.shape)}; this network expects {shape} with {width} "
                f"{self.settings[width]}. Use a verifier with the model that it was calibrated for"
            )


def _positions(like: Tensor) -> Tensor:
    """Sines and cosines (L, width) of each position (Vaswani et al., 2017, section 3.5)."""
    length, width = like.shape[1:]
    place = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(1e4) / width))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], 1).to(like.dtype)
