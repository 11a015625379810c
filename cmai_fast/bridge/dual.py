"""Dual encoders (CLIP, SigLIP): an image and a text each become one vector, and F is their scaled cosine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cmai_fast.bridge.one_image import OneImageBridge

_TEXTS = 512  # encoded at once


class DualBridge(OneImageBridge):
    """The three-part view of a model with `get_image_features`, `get_text_features` and `logit_scale`.

    Such a model has no language-model loss. L_task is that of zero-shot classification and of attacks on CLIP (TeCoA,
    Mao et al. 2023; Robust CLIP, Schlarmann et al. 2024): the cross-entropy of each image against a fixed set of K
    texts, `labels` (N,) being the index of the right one. The usual sets are class prompts, or the captions of the
    batch (`labels = arange(N)`, the image-to-text half of CLIP's loss); in distributed runs each process uses the
    captions of its own batch. SigLIP's bias cancels, and the text with the highest score is the answer.

    A batch holds `pixel_values` (N, 3, H, W), `labels` (N,), and the texts: `input_ids` and `attention_mask` (K, L), or
    `text_embeds` (K, text_dim) from `encode_texts`, so that a fixed set is encoded once and not at every step of an
    attack. h_v is (N, 1, image_dim), before normalisation. Where several texts of the set are right for an image, as
    the five captions of COCO are, `relevant` (N, K) bool marks them: the loss is then that of any of them, -log of the
    sum of their probabilities, and an image is right if the nearest text is one of them. Without it an attack would
    move an image from one of its captions to another.
    """

    text_keys: tuple[str, ...] = ("input_ids", "attention_mask", "text_embeds", "labels", "relevant")

    def __init__(self, model: nn.Module) -> None:
        missing = [k for k in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(model, k)]
        if missing:
            raise ValueError(f"{type(model).__name__} cannot be bridged as a dual encoder: no {', no '.join(missing)}")
        self.model: Any = model
        config: Any = model.config
        self.image_dim: int = getattr(config, "projection_dim", config.vision_config.hidden_size)
        self.text_dim: int = getattr(config, "projection_dim", config.text_config.hidden_size)
        self.image_size: int | None = getattr(config.vision_config, "image_size", None)
        self.context: int | None = config.text_config.max_position_embeddings

    @property
    def text_model(self) -> Any:
        """The text encoder."""
        return self.model.text_model

    @property
    def vision_side(self) -> list[nn.Module]:
        parts = ("vision_model", "visual_projection")
        return [getattr(self.model, name) for name in parts if hasattr(self.model, name)]

    @property
    def vision_parameters(self) -> list[nn.Parameter]:
        return [p for m in self.vision_side for p in m.parameters()]

    def select(
        self, inputs: Mapping[str, torch.Tensor], rows: torch.Tensor, images_per_row: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The labels of `rows`; the texts are shared by all rows."""
        return {k: v[rows] if k in ("labels", "relevant") else v for k, v in inputs.items()}

    def own_texts(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        places = batch["labels"]
        if "input_ids" not in batch:  # a fixed set, shared by all batches
            return places[:, None], torch.ones_like(places[:, None])
        ids = batch["input_ids"][places]
        mask = batch.get("attention_mask")
        return ids, torch.ones_like(ids) if mask is None else mask[places]

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output.unsqueeze(1)

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(K, L) to (K, text_dim), before normalisation: the `text_embeds` of a batch.

        Without gradients, many texts (the captions of a whole data set) are encoded a part at a time.
        """
        if torch.is_grad_enabled() or len(input_ids) <= _TEXTS:
            return self.model.get_text_features(
                input_ids=input_ids, attention_mask=attention_mask, return_dict=True
            ).pooler_output
        parts = [slice(k, k + _TEXTS) for k in range(0, len(input_ids), _TEXTS)]
        mask = attention_mask
        return torch.cat([self.encode_texts(input_ids[p], None if mask is None else mask[p]) for p in parts])

    def encode_text(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        relevant: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """E_t: h_t (N, text_dim) of each image's own text, `labels` (N,) being its index in the set."""
        texts = self._texts(input_ids, attention_mask, text_embeds)
        return texts[_places(labels, len(texts))]

    def fuse(
        self,
        image_features: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        relevant: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """F: h_v (N, 1, image_dim) and the texts to logits (N, 1, K), `logits_per_image` of the model, and (N, 1).

        Raises:
            ValueError: no texts, or a label outside the set.
        """
        texts = self._texts(input_ids, attention_mask, text_embeds)
        places = _places(labels, len(texts))
        if len(places) != len(image_features):
            raise ValueError(f"there are {len(image_features)} images and {len(places)} labels; expected one per image")
        logits = F.normalize(image_features.squeeze(1), dim=-1) @ F.normalize(texts, dim=-1).t()
        logits = logits * self.model.logit_scale.exp() + getattr(self.model, "logit_bias", 0.0)
        return logits.unsqueeze(1), places.unsqueeze(1)

    def losses(self, image_features: torch.Tensor, **text_inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        relevant = text_inputs.get("relevant")
        if relevant is None:
            return super().losses(image_features, **text_inputs)
        logits = self.fuse(image_features, **text_inputs)[0].squeeze(1)
        if relevant.shape != logits.shape or not relevant.any(1).all():
            raise ValueError(
                f"relevant has shape {tuple(relevant.shape)}; expected {tuple(logits.shape)}, one row per image with "
                "at least one text"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = logits.logsumexp(1) - logits.masked_fill(~relevant, float("-inf")).logsumexp(1)
        return losses, relevant.gather(1, logits.detach().argmax(1, keepdim=True)).squeeze(1)

    def _texts(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if text_embeds is not None:
            return text_embeds
        if input_ids is None:
            raise ValueError("the batch has neither input_ids nor text_embeds; a dual encoder needs the set of texts")
        return self.encode_texts(input_ids, attention_mask)


def _places(labels: torch.Tensor | None, texts: int) -> torch.Tensor:
    if labels is None or labels.dim() != 1:
        shape = None if labels is None else tuple(labels.shape)
        raise ValueError(f"labels have shape {shape}; a dual encoder needs (N,), the index of each image's own text")
    outside = (labels < 0) | (labels >= texts)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"row {row} of labels is {int(labels[row])}; expected an index of one of the {texts} texts")
    return labels
