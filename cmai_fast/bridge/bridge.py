"""The adapter for image-text models with the protocol of `transformers`: E_v, E_t and F of the same weights.

`get_image_features(pixel_values, ...)` computes the output of the vision side (h_v, for LLaVA the projector's output),
and `forward(mm_encoder_outputs={"image": ...})` takes it instead of `pixel_values`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from cmai_fast.bridge.labels import IGNORE, check_labels, is_right, task_loss
from cmai_fast.bridge.one_image import check_size
from cmai_fast.bridge.output_layer import OutputLayer
from cmai_fast.layout import runs

_PER_IMAGE = ("image_sizes", "image_grid_thw")
# Set by `fuse` itself, or redundant with other keys of the batch.
_NOT_FROM_BATCH = {
    "pixel_values",
    "mm_encoder_outputs",
    "position_ids",
    "inputs_embeds",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}


class Bridge:
    """The three-part view of a generative model; it has no weights of its own and changes none.

    `bridge_of` chooses between this class and those of dual encoders and encoder-decoders. A batch is what the model's
    own forward takes. h_v is (N, T, image_dim), one row per sample: the features of all its images, concatenated and
    padded with zeros.

    Args:
        model: an image-text model of `transformers` (docs/families.md lists the tested ones).

    Raises:
        ValueError: the model lacks a piece of the protocol; the message names it.
    """

    needs: tuple[str, ...] = ("input_ids", "attention_mask", "labels")

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        forward = inspect.signature(model.forward).parameters
        missing = [
            piece
            for piece, there in (
                ("get_image_features", hasattr(model, "get_image_features")),
                ("forward(mm_encoder_outputs=...)", "mm_encoder_outputs" in forward),
                ("a language_model (get_decoder)", hasattr(model, "get_decoder")),
                ("config.image_token_id", getattr(config, "image_token_id", None) is not None),
            )
            if not there
        ]
        if missing:
            raise ValueError(f"{type(model).__name__} cannot be bridged: it has no {', no '.join(missing)}")
        if not getattr(config, "use_decoder_only_language_model", True):
            raise ValueError(
                f"{type(model).__name__} cannot be bridged: its language model is an encoder-decoder, whose labels "
                "differ in length from input_ids. Use a checkpoint with a decoder-only one (OPT, Vicuna)"
            )
        self.model: Any = model
        text = config.get_text_config()
        self._output = OutputLayer(text.vocab_size)
        vision = getattr(config, "vision_config", None)
        # h_v is scattered into the text embeddings, so both sides have the text model's width. Qwen3-VL also adds
        # features of earlier layers to the first layers of the language model: they are part of h_v.
        self._deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        self.image_dim: int = text.hidden_size * (1 + self._deep)
        self.text_dim: int = text.hidden_size
        self.image_size: int | None = getattr(vision, "image_size", None)
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        encoder = inspect.signature(self.model.get_image_features).parameters  # type: ignore[arg-type]  # a method
        self._required = [k for k, p in encoder.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        self.image_keys: tuple[str, ...] = ("input_ids", *(k for k in encoder if k not in ("pixel_values", "kwargs")))
        others = (k for k in forward if k not in {*_NOT_FROM_BATCH, *self.needs, "kwargs"})
        self.text_keys: tuple[str, ...] = (*self.needs, *others)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    @property
    def text_model(self) -> Any:
        """The language model without its head."""
        decoder = self.model.get_decoder()
        return getattr(decoder, "base_model", decoder)

    @property
    def _reads_both_ways(self) -> bool:
        return bool(getattr(self.text_model.config, "use_bidirectional_attention", False))

    @property
    def vision_side(self) -> list[nn.Module]:
        """The modules of E_v, such as the vision tower and the projector."""
        text = self.text_model
        return [m for m in self._body.children() if all(part is not text for part in m.modules())]

    @property
    def vision_parameters(self) -> list[nn.Parameter]:
        """The parameters of `vision_side`, and those outside of modules, such as queries and row separators."""
        modules = [p for m in self.vision_side for p in m.parameters()]
        return [*modules, *self._body.parameters(recurse=False)]

    @property
    def _body(self) -> nn.Module:
        return getattr(self.model, "model", self.model)

    def inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs of `encode_image` in a batch, apart from `pixel_values`, and those of `fuse` and `encode_text`."""
        return {k: batch[k] for k in self.image_keys if k in batch}, {k: batch[k] for k in self.text_keys if k in batch}

    def select(
        self, inputs: Mapping[str, torch.Tensor], rows: torch.Tensor, images_per_row: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The part of these inputs that belongs to `rows` (n,) of the batch. `images_per_row` (N,); None: one each."""
        images = rows if images_per_row is None else runs(images_per_row, rows)
        return {k: v[images if k in _PER_IMAGE else rows] for k, v in inputs.items()}

    def own_texts(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The texts for comparing rows: tokens (N, L), and a mask of those that count."""
        return batch["input_ids"], batch["attention_mask"]

    def image_tokens(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The number of tokens of h_v of each row (N,), the rest being padding; None if all have the same number."""
        counts = (batch["input_ids"] == self.model.config.image_token_id).sum(1)
        return None if bool((counts == counts[:1]).all()) else counts

    def images_per_row(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, **image_inputs: Any) -> torch.Tensor:
        """The number of images of each sample (N,), from its image tokens.

        Raises:
            ValueError: the tokens cannot be assigned to the images.
        """
        tokens = (input_ids == self.model.config.image_token_id).sum(1)
        images = next((len(image_inputs[k]) for k in _PER_IMAGE if k in image_inputs), len(pixel_values))
        if images == len(tokens) and bool((tokens > 0).all()):
            return torch.ones_like(tokens)
        if images == len(pixel_values) and pixel_values.dim() == 4:
            lengths = torch.full((images,), int(tokens.sum()) // max(images, 1), device=tokens.device)
        else:
            # The number of tokens of an image depends on the model: sizes, tiles, merged patches.
            with torch.no_grad():
                features = self._encode(pixel_values, **image_inputs)
            lengths = torch.tensor([len(f) for f in features], device=tokens.device)
        ends = tokens.cumsum(0)
        row = torch.searchsorted(ends, lengths.cumsum(0)).clamp_max(len(tokens) - 1)
        if not torch.equal(torch.zeros_like(tokens).index_add(0, row, lengths), tokens):
            raise ValueError(
                f"{self._name}: the samples have {tokens.tolist()} image tokens and the images "
                f"{lengths.tolist()}; these cannot be assigned in order. Make text and images in one call of the "
                "model's own processor"
            )
        return torch.bincount(row, minlength=len(tokens))

    def encode_image(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor | None = None, **image_inputs: Any
    ) -> torch.Tensor:
        """E_v: normalised `pixel_values`, laid out as the model takes them, to h_v (N, T, image_dim), differentiable.

        Args:
            input_ids: (N, L), whose image tokens assign features to samples; None: one image per sample.
            image_inputs: other inputs of the family's `get_image_features`: `image_sizes`, `image_grid_thw`,
                `pixel_attention_mask`, `qformer_input_ids`, ...

        Raises:
            ValueError: images of the wrong size, or not as many image tokens as features.
        """
        if not image_inputs and "pixel_attention_mask" not in self.image_keys:
            check_size(self.model, pixel_values, self.image_size)
        features = self._encode(pixel_values, **image_inputs)
        if input_ids is None:
            lengths = {len(f) for f in features}
            if len(lengths) > 1:
                raise ValueError(
                    f"{self._name}: the images take {sorted(lengths)} tokens; pass input_ids, whose image tokens "
                    "assign images to samples"
                )
            return torch.stack(features)
        here = input_ids == self.model.config.image_token_id
        counts, packed = here.sum(1), torch.cat(features)
        if int(counts.sum()) != len(packed):
            raise ValueError(
                f"{self._name}: the images take {len(packed)} tokens ({_several(len(f) for f in features)}), and "
                "input_ids hold "
                f"{int(counts.sum())} image tokens (id {self.model.config.image_token_id}; by sample "
                f"{_several(counts.tolist())}). Make text and images in one call of the model's own processor"
            )
        return _pad_runs(packed, counts)

    def _encode(self, pixel_values: torch.Tensor, **image_inputs: Any) -> list[torch.Tensor]:
        """Features (T_i, image_dim) of each image."""
        required = ["image_grid_thw"] if pixel_values.dim() == 2 else self._required
        if missing := [k for k in required if k != "pixel_values" and image_inputs.get(k) is None]:
            raise ValueError(
                f"the batch has no {', no '.join(missing)}, which {self._name} needs to read images; "
                "pass everything that its processor makes"
            )
        output = self.model.get_image_features(pixel_values=pixel_values, return_dict=True, **image_inputs)
        deep = getattr(output, "deepstack_features", None) or ()
        return [torch.cat(parts, -1) if deep else parts[0] for parts in zip(output.pooler_output, *deep, strict=True)]

    def encode_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """E_t: prompt and response without the image, to h_t (N, text_dim).

        The language model reads the text alone (image tokens are dropped), and its last hidden state is averaged over
        the response (`labels` != -100), which has attended to the prompt before it. `input_ids`, `attention_mask`,
        `labels`: (N, L); other keys of a batch are ignored.

        Raises:
            ValueError: a row without any response token.
        """
        check_labels(labels)
        keep = (input_ids != self.model.config.image_token_id) & attention_mask.bool()
        # Pack the kept tokens to the right, so that rows with and without images look the same.
        length = int(keep.sum(1).max())
        order = keep.to(torch.int8).sort(dim=1, stable=True).indices[:, -length:]
        ids, mask, targets = (t.gather(1, order) for t in (input_ids, keep, labels))
        if self._reads_both_ways:
            # A column of padding: without any, its attention drops the causal mask and sees the answer.
            ids, mask, targets = (F.pad(t, (1, 0)) for t in (ids, mask, targets))
        hidden = self.text_model(
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
        **text_inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """F: h_v and the text to next-token logits at the labels.

        `text_inputs` are other inputs of the family's forward: `token_type_ids`, `mm_token_type_ids`, `image_grid_thw`,
        ... Returns logits (N, L', vocabulary) and targets (N, L'), -100 where a row has no target. L' is the number of
        columns in which any row has a label; logits of other columns are never computed.

        Raises:
            ValueError: a row without labels, a sequence longer than the model's context, or not as many image tokens as
                features.
        """
        check_labels(labels)
        if self._reads_both_ways and "token_type_ids" in self.text_keys:
            kinds = text_inputs.get("token_type_ids")
            if kinds is None or bool((kinds[labels != IGNORE] == 0).any()):
                what = "has no token_type_ids" if kinds is None else "has labels where token_type_ids is 0"
                raise ValueError(
                    f"the batch {what}; {self._name} attends in both directions where they are 0 (prompt and "
                    "image), so they must be 1 in the response. Pass the response to its processor as suffix"
                )
        if self.context is not None and input_ids.shape[1] > self.context:
            raise ValueError(
                f"{self._name}: a sample has {input_ids.shape[1]} tokens with its labels, the model's context is "
                f"{self.context}; shorten the text or use a model with a longer context"
            )
        body: Any = self._body
        rotary = hasattr(body, "get_rope_index")  # positions in time, height and width, which the model computes itself
        deltas = getattr(body, "rope_deltas", None)
        columns = (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1)
        try:
            output = self.model(
                input_ids=input_ids,
                pixel_values=None,
                attention_mask=attention_mask,
                position_ids=None if rotary else _positions(attention_mask.bool()),
                mm_encoder_outputs={"image": self._crossing(image_features, input_ids)},
                logits_to_keep=columns,
                use_cache=False,
                **text_inputs,
            )
        finally:
            if rotary:
                body.rope_deltas = deltas  # a generation in progress needs its own
        return output.logits, labels[:, 1:].index_select(1, columns)

    def losses(self, image_features: torch.Tensor, **text_inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """`task_loss` (N,), differentiable, and `is_right` (N,) of the result of `fuse` for the same arguments.

        Large logits are computed and used in chunks of tokens (`token_losses`), with equal results up to rounding. This
        needs an output layer whose output is the logits themselves, in a model that is not sharded.
        """
        chunked = self._output.losses(self, image_features, text_inputs)
        if chunked is not None:
            return chunked
        logits, targets = self.fuse(image_features, **text_inputs)
        return task_loss(logits, targets), is_right(logits.detach(), targets)

    def _crossing(self, image_features: torch.Tensor, input_ids: torch.Tensor) -> _Crossing:
        """The output of `get_image_features`, rebuilt from h_v."""
        counts = (input_ids == self.model.config.image_token_id).sum(1)
        place = torch.arange(image_features.shape[1], device=counts.device)
        real = place < counts[:, None]
        # Padding is zero and features are not, so a surplus token shows in a row with padding too. A row without
        # padding may hold zeros, and so may a whole sample: a caller may blank them.
        used = (image_features.detach().any(-1) * (place + 1)).amax(1) if len(place) else counts * 0
        wrong = (used > counts) | (counts > len(place)) | ((used > 0) & (used < counts) & (counts < len(place)))
        if len(counts) != len(image_features) or bool(wrong.any()):
            raise ValueError(
                f"{self._name}: h_v has {len(image_features)} rows of up to {real.shape[1]} tokens, and input_ids hold "
                f"{_several(counts.tolist())} image tokens (id {self.model.config.image_token_id}) per "
                "sample; expected as many tokens as features. Make text and images in one call of the model's own "
                "processor"
            )
        first, *deep = image_features[real].chunk(1 + self._deep, dim=-1)
        return _Crossing(_Packed([first]), [[d] for d in deep])


@dataclass
class _Crossing(ModelOutput):
    """The fields of an encoded image that forward reads, in any family."""

    pooler_output: Any = None
    deepstack_features: Any = None
    qformer_outputs: Any = None
    vision_outputs: Any = None


class _Packed(list):
    """One tensor (tokens, width): some families concatenate a list of images, others move one tensor to a device."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self[0][None].to(*args, **kwargs)


def _pad_runs(packed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(sum of counts, ...) to (N, longest, ...), zero-padded at the end of each row."""
    longest = int(counts.max()) if len(counts) else 0
    if bool((counts == longest).all()):
        return packed.reshape(len(counts), longest, *packed.shape[1:])
    padded = packed.new_zeros(len(counts), longest, *packed.shape[1:])
    real = torch.arange(longest, device=counts.device) < counts[:, None]
    return padded.index_put((real.nonzero(as_tuple=True)), packed)


def _several(values: Any) -> str:
    """A list, or `4 x 16` if all are equal."""
    values = list(values)
    return f"{len(values)} x {values[0]}" if len(set(values)) == 1 else str(values)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions counted over real tokens, so that padding does not shift a row: results do not depend on the batch."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)
