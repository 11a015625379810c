"""V_verify: a small network that says how well an image agrees with statements, each a question with an answer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cmai_fast import ops
from cmai_fast.cmcv.heads import ImageSide


class VerifyNetwork(ImageSide):
    """Image and statement are projected into one space and compared by the cosine, S_c.

    The words of a statement come in as the language model's input embeddings, so that the network costs no pass of the
    language model and nothing that it reads of the text depends on the image. Question and answer are read together:
    "is there a red shape? yes" and "... no" are then opposite directions. A network in which the question looks at the
    image and the answer is compared with what it finds stayed at chance on such questions for 1,500 batches.

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
        sizes = {"image_dim": image_dim, "text_dim": text_dim, "hidden": hidden, "width": width, "dim": dim}
        super().__init__({**sizes, "heads": heads}, 10.0)
        if width % (2 * heads):
            raise ValueError(f"width is {width}; expected a multiple of {2 * heads}, twice the number of heads")
        layer: dict[str, Any] = {
            "d_model": width, "nhead": heads, "dim_feedforward": 2 * width, "dropout": 0.0, "activation": "gelu",
            "batch_first": True, "norm_first": True,
        }  # fmt: skip
        self.words = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.part = nn.Embedding(2, width)  # of the question, of the answer
        self.text = nn.TransformerEncoderLayer(**layer)
        self.text_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def statements(self, embeddings: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
        """Statements to (M, dim).

        Args:
            embeddings: input embeddings (M, L, text_dim) of the words.
            mask: (M, L) bool, which words are no padding.
            answer: (M, L) bool, which words are the answer's; at least one per row.
        """
        self._check(embeddings, 3, "text_dim", "(M, L, text_dim)")
        read = self.words(embeddings.to(self.logit_scale.dtype)) + self.part(answer.long())
        states = self.text(read + _positions(read), src_key_padding_mask=~mask)
        kept = answer[..., None].to(states.dtype)
        return self.text_out((states * kept).sum(1) / kept.sum(1))

    def cosine(self, image: Tensor, statements: Tensor) -> Tensor:
        """S_c (N, K) in [-1, 1] of images (N, dim) and the statements (N, K, dim) of each."""
        return ops.cosine_heads(image.unsqueeze(1).expand(statements.shape).contiguous(), statements)


def _positions(like: Tensor) -> Tensor:
    """Sines and cosines (L, width) of each position (Vaswani et al., 2017, section 3.5)."""
    length, width = like.shape[1:]
    place = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(1e4) / width))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], 1).to(like.dtype)
