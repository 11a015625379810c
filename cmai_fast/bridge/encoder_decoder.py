"""Encoder-decoders (ViT-GPT2, TrOCR): the decoder attends to h_v, and the whole text is the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from cmai_fast.bridge.labels import IGNORE, check_labels
from cmai_fast.bridge.one_image import OneImageBridge


class EncoderDecoderBridge(OneImageBridge):
    """The three-part view of `VisionEncoderDecoderModel`, whose forward takes `encoder_outputs`.

    A batch holds `pixel_values` (N, 3, H, W) and `labels` (N, L), -100 before or after a row's own tokens. h_v is the
    encoder's last hidden state (N, T, image_dim).

    Raises:
        ValueError: the model lacks a piece; the message names it.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, name, None) is None:
                raise ValueError(
                    f"{type(model).__name__} cannot be bridged: its config has no {name}, so labels cannot be turned "
                    "into the decoder's input; set it"
                )
        self.model: Any = model
        self.image_dim: int = config.encoder.hidden_size
        self.text_dim: int = config.decoder.hidden_size
        self.image_size: int | None = getattr(config.encoder, "image_size", None)
        self.context: int | None = getattr(config.decoder, "max_position_embeddings", None)

    @property
    def text_model(self) -> Any:
        return self.model.decoder.base_model

    @property
    def vision_side(self) -> list[nn.Module]:
        return [self.model.encoder]

    @property
    def vision_parameters(self) -> list[nn.Parameter]:
        return list(self.model.encoder.parameters())

    def select(
        self, inputs: Mapping[str, torch.Tensor], rows: torch.Tensor, images_per_row: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        return {k: v[rows] for k, v in inputs.items()}

    def own_texts(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        targets = self._packed(batch["labels"])
        return targets, targets != IGNORE

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encoder(pixel_values=pixel_values, return_dict=True).last_hidden_state

    def encode_text(self, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        """E_t: the response alone, read by the decoder without an image: its mean hidden state (N, text_dim)."""
        targets = self._packed(labels)
        ids = torch.where(targets == IGNORE, self.model.config.pad_token_id, targets)
        hidden = self.text_model(
            input_ids=ids, attention_mask=(targets != IGNORE).long(), use_cache=False, return_dict=True
        ).last_hidden_state
        response = (targets != IGNORE).unsqueeze(-1).to(hidden.dtype)
        return (hidden * response).sum(1) / response.sum(1)

    def fuse(self, image_features: torch.Tensor, labels: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """F: h_v and the labels to logits (N, L', vocabulary) and targets (N, L'), L' the longest response."""
        targets = self._packed(labels)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=image_features),
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(targets),
            decoder_attention_mask=(targets != IGNORE).long(),
            use_cache=False,
            return_dict=True,
        )
        return output.logits, targets

    def _packed(self, labels: torch.Tensor) -> torch.Tensor:
        """Moves each row's own labels to the front: the decoder is causal, so padding after them has no effect."""
        check_labels(labels, first=0)
        own = labels != IGNORE
        longest = int(own.sum(1).max())
        if self.context is not None and longest > self.context:
            raise ValueError(
                f"{type(self.model).__name__}: a sample has {longest} labels, the decoder's context is {self.context}; "
                "shorten the text"
            )
        return labels.gather(1, (~own).to(torch.int8).sort(dim=1, stable=True).indices)[:, :longest]
