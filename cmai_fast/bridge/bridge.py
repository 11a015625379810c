"""One adapter for image-text models that speak the protocol of `transformers`: E_v, E_t and F of the same weights.

`get_image_features(pixel_values)` computes what the vision side hands over (h_v, for LLaVA the projector's output)
and `forward(mm_encoder_outputs={"image": ...})` takes it back in place of `pixel_values`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

IGNORE = -100


class Bridge:
    """The three-part view of a model; it holds no weights of its own and changes none.

    Args:
        model: an image-text model of `transformers` (tested: `LlavaForConditionalGeneration`).

    Raises:
        ValueError: the model lacks a piece of the protocol; the message names it.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        forward = inspect.signature(model.forward).parameters
        missing = [
            piece
            for piece, there in (
                ("get_image_features", hasattr(model, "get_image_features")),
                ("forward(mm_encoder_outputs=...)", "mm_encoder_outputs" in forward),
                ("a language_model", hasattr(getattr(model, "model", None), "language_model")),
                ("config.image_token_id", getattr(config, "image_token_id", None) is not None),
            )
            if not there
        ]
        if missing:
            raise ValueError(
                f"{type(model).__name__} cannot be bridged: it has no {', no '.join(missing)}. "
                "Supported: image-text models of transformers >= 5.23 such as LlavaForConditionalGeneration"
            )
        self.model: Any = model
        text = config.get_text_config()
        # What crosses the bridge is scattered into the text embeddings, so both sides have the text model's width.
        self.image_dim: int = text.hidden_size
        self.text_dim: int = text.hidden_size
        vision = getattr(config, "vision_config", None)
        self.image_size: int | None = getattr(vision, "image_size", None)
        self.context: int = text.max_position_embeddings

    @property
    def vision_side(self) -> list[nn.Module]:
        """The modules that E_v runs through: the vision tower and the projector."""
        inner = self.model.model
        return [m for m in (inner.vision_tower, getattr(inner, "multi_modal_projector", None)) if m is not None]

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """E_v: normalised `pixel_values` (N, 3, H, W) to h_v (N, T, image_dim), differentiable."""
        size = self.image_size
        if pixel_values.dim() != 4 or (size and tuple(pixel_values.shape[-2:]) != (size, size)):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this model reads (N, 3, {size}, {size}). "
                "Resize the images with the model's own processor"
            )
        features = self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return torch.stack(list(features))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """E_t: prompt and response without the image, to h_t (N, text_dim).

        The language model reads the text alone (image tokens are dropped), and its last hidden state is averaged over
        the response (`labels` != -100), which has attended to the prompt before it. `input_ids`, `attention_mask`,
        `labels`: (N, L).

        Raises:
            ValueError: a row without any response token.
        """
        _check_labels(labels)
        keep = (input_ids != self.model.config.image_token_id) & attention_mask.bool()
        # Pack the kept tokens to the right, so that rows with images and rows without have the same form.
        length = int(keep.sum(1).max())
        order = keep.to(torch.int8).sort(dim=1, stable=True).indices[:, -length:]
        ids, mask, targets = (t.gather(1, order) for t in (input_ids, keep, labels))
        hidden = self.model.model.language_model(
            input_ids=ids, attention_mask=mask.long(), position_ids=_positions(mask), use_cache=False
        ).last_hidden_state
        response = ((targets != IGNORE) & mask).unsqueeze(-1).to(hidden.dtype)
        return (hidden * response).sum(1) / response.sum(1)

    def fuse(
        self,
        image_features: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """F: h_v and the text to next-token logits where there are labels.

        Returns logits (N, L', vocabulary) and targets (N, L'), -100 where a row has no target. L' counts the columns in
        which any row has a label: logits of the others are never computed.

        Raises:
            ValueError: a row without labels, or a sequence longer than the model's context.
        """
        _check_labels(labels)
        if input_ids.shape[1] > self.context:
            raise ValueError(
                f"a sample has {input_ids.shape[1]} tokens with its labels, the model's context is {self.context}; "
                "shorten the text or use a model with a longer context"
            )
        columns = (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask.bool()),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(image_features))},
            logits_to_keep=columns,
            use_cache=False,
        )
        return output.logits, labels[:, 1:].index_select(1, columns)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions counted over real tokens, so that padding does not shift a row: results do not depend on the batch."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def _check_labels(labels: torch.Tensor) -> None:
    empty = ~(labels[:, 1:] != IGNORE).any(1)
    if empty.any():
        raise ValueError(
            f"row {int(empty.nonzero()[0])} of labels holds only -100 after its first token, so it has no target; "
            "give every sample a response"
        )


def task_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_task (N,) of each sample: mean cross-entropy over its target tokens, float32 or better.

    logits (N, L', V), targets (N, L'), as from `Bridge.fuse`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    return losses.sum(1) / (targets != IGNORE).sum(1)


def is_right(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether every target token is the most likely one, (N,) bool.

    Equal to "greedy generation gives exactly this response": with a right prefix, the next token is generated from the
    same logits.
    """
    return ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(1)
