"""One adapter for image-text models that speak the protocol of `transformers`: E_v, E_t and F of the same weights.

`get_image_features(pixel_values, ...)` computes what the vision side hands over (h_v, for LLaVA the projector's output)
and `forward(mm_encoder_outputs={"image": ...})` takes it back in place of `pixel_values`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import ModelOutput

from cmai_fast.bridge.frozen import frozen
from cmai_fast.bridge.packed import unpacked
from cmai_fast.bridge.replaced import replaced
from cmai_fast.bridge.token_loss import token_losses
from cmai_fast.layout import runs

IGNORE = -100
_LARGE = 1 << 26  # logits that take a quarter of a GiB in float32, and several times that in the loss
_PER_IMAGE = ("image_sizes", "image_grid_thw")
# What `fuse` decides itself, or what stands for the same as something else in the batch.
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
    """The three-part view of a generative model; it holds no weights of its own and changes none.

    `bridge_of` chooses between this one and those of dual encoders and encoder-decoders, which have the same methods.
    A batch is what the model's own forward takes. h_v is (N, T, image_dim), one row a sample: the features of all its
    images, one after another, and zeros where it has fewer than the others.

    Args:
        model: an image-text model of `transformers` (docs/families.md says which are tested).

    Raises:
        ValueError: the model lacks a piece of the protocol; the message names it.
    """

    needs: tuple[str, ...] = ("input_ids", "attention_mask", "labels")
    _vocabulary: int = 0
    _last: tuple[nn.Module, bool] | None = None  # the output layer, and whether it gives the model's logits

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
            raise ValueError(
                f"{type(model).__name__} cannot be bridged: it has no {', no '.join(missing)}. "
                "Supported: image-text models of transformers >= 5.23 such as LlavaForConditionalGeneration"
            )
        if not getattr(config, "use_decoder_only_language_model", True):
            raise ValueError(
                f"{type(model).__name__} cannot be bridged: its language model is an encoder-decoder, whose labels "
                "have another length than input_ids. Use a checkpoint with a decoder-only one (OPT, Vicuna)"
            )
        self.model: Any = model
        text = config.get_text_config()
        self._vocabulary = text.vocab_size
        vision = getattr(config, "vision_config", None)
        # What crosses the bridge is scattered into the text embeddings, so both sides have the text model's width.
        # Qwen3-VL adds features of earlier layers to the first layers of the language model: they cross, too.
        self._deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        self.image_dim: int = text.hidden_size * (1 + self._deep)
        self.text_dim: int = text.hidden_size
        self.image_size: int | None = getattr(vision, "image_size", None)
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        encoder = inspect.signature(self.model.get_image_features).parameters  # type: ignore[arg-type]  # a method
        self._required = [k for k, p in encoder.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        self.image_keys = ("input_ids", *(k for k in encoder if k not in ("pixel_values", "kwargs")))
        self.text_keys = (*self.needs, *(k for k in forward if k not in {*_NOT_FROM_BATCH, *self.needs, "kwargs"}))

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
        """The modules that E_v runs through, such as the vision tower and the projector."""
        text = self.text_model
        return [m for m in self._body.children() if all(part is not text for part in m.modules())]

    @property
    def vision_parameters(self) -> list[nn.Parameter]:
        """Those of `vision_side`, and what stands between modules, such as queries and separators of rows."""
        modules = [p for m in self.vision_side for p in m.parameters()]
        return [*modules, *self._body.parameters(recurse=False)]

    @property
    def _body(self) -> nn.Module:
        return getattr(self.model, "model", self.model)

    def inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `encode_image` takes of a batch beside `pixel_values`, and what `fuse` and `encode_text` take."""
        return {k: batch[k] for k in self.image_keys if k in batch}, {k: batch[k] for k in self.text_keys if k in batch}

    def select(
        self, inputs: Mapping[str, torch.Tensor], rows: torch.Tensor, images_per_row: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Of these inputs, what belongs to `rows` (n,) of the batch. `images_per_row` (N,); None: one each."""
        images = rows if images_per_row is None else runs(images_per_row, rows)
        return {k: v[images if k in _PER_IMAGE else rows] for k, v in inputs.items()}

    def own_texts(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What tells the texts of two rows apart: tokens (N, L), and which of them count."""
        return batch["input_ids"], batch["attention_mask"]

    def image_tokens(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """How many tokens of h_v belong to each row (N,), the others being padding; None where all have the same."""
        counts = (batch["input_ids"] == self.model.config.image_token_id).sum(1)
        return None if bool((counts == counts[:1]).all()) else counts

    def images_per_row(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, **image_inputs: Any) -> torch.Tensor:
        """How many images each sample has (N,), by its image tokens.

        Raises:
            ValueError: the tokens cannot be shared out among the images.
        """
        tokens = (input_ids == self.model.config.image_token_id).sum(1)
        images = next((len(image_inputs[k]) for k in _PER_IMAGE if k in image_inputs), len(pixel_values))
        if images == len(tokens) and bool((tokens > 0).all()):
            return torch.ones_like(tokens)
        if images == len(pixel_values) and pixel_values.dim() == 4:
            lengths = torch.full((images,), int(tokens.sum()) // max(images, 1), device=tokens.device)
        else:
            # How an image becomes tokens is the model's own affair: sizes, tiles, merged patches.
            with torch.no_grad():
                features = self._encode(pixel_values, **image_inputs)
            lengths = torch.tensor([len(f) for f in features], device=tokens.device)
        ends = tokens.cumsum(0)
        row = torch.searchsorted(ends, lengths.cumsum(0)).clamp_max(len(tokens) - 1)
        if not torch.equal(torch.zeros_like(tokens).index_add(0, row, lengths), tokens):
            raise ValueError(
                f"the samples have {tokens.tolist()} image tokens and the images {lengths.tolist()}; these cannot be "
                "shared out in order. Make text and images in one call of the model's own processor"
            )
        return torch.bincount(row, minlength=len(tokens))

    def encode_image(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor | None = None, **image_inputs: Any
    ) -> torch.Tensor:
        """E_v: normalised `pixel_values`, laid out as the model takes them, to h_v (N, T, image_dim), differentiable.

        Args:
            input_ids: (N, L), whose image tokens say which features belong to which sample; None: one image a sample.
            image_inputs: what else the family's `get_image_features` takes: `image_sizes`, `image_grid_thw`,
                `pixel_attention_mask`, `qformer_input_ids`, ...

        Raises:
            ValueError: images of the wrong size, or not as many image tokens as features.
        """
        size, keys = self.image_size, set(image_inputs)
        plain = isinstance(size, int) and not keys and "pixel_attention_mask" not in self.image_keys
        if plain and (pixel_values.dim() != 4 or tuple(pixel_values.shape[-2:]) != (size, size)):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this model reads (N, 3, {size}, {size}). "
                "Resize the images with the model's own processor"
            )
        features = self._encode(pixel_values, **image_inputs)
        if input_ids is None:
            lengths = {len(f) for f in features}
            if len(lengths) > 1:
                raise ValueError(
                    f"the images take {sorted(lengths)} tokens; pass input_ids, whose image tokens say which image "
                    "belongs to which sample"
                )
            return torch.stack(features)
        here = input_ids == self.model.config.image_token_id
        counts, packed = here.sum(1), torch.cat(features)
        if int(counts.sum()) != len(packed):
            raise ValueError(
                f"the images take {len(packed)} tokens ({_several(len(f) for f in features)}), and input_ids hold "
                f"{int(counts.sum())} image tokens (id {self.model.config.image_token_id}; by sample "
                f"{_several(counts.tolist())}). Make text and images in one call of the model's own processor"
            )
        return _pad_runs(packed, counts)

    def _encode(self, pixel_values: torch.Tensor, **image_inputs: Any) -> list[torch.Tensor]:
        """Features (T_i, image_dim) of each image."""
        required = ["image_grid_thw"] if pixel_values.dim() == 2 else self._required
        if missing := [k for k in required if k != "pixel_values" and image_inputs.get(k) is None]:
            raise ValueError(
                f"the batch has no {', no '.join(missing)}, which {type(self.model).__name__} needs to read images; "
                "pass on all that its processor makes"
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
        `labels`: (N, L); what else a batch holds is not read.

        Raises:
            ValueError: a row without any response token.
        """
        _check_labels(labels)
        keep = (input_ids != self.model.config.image_token_id) & attention_mask.bool()
        # Pack the kept tokens to the right, so that rows with images and rows without have the same form.
        length = int(keep.sum(1).max())
        order = keep.to(torch.int8).sort(dim=1, stable=True).indices[:, -length:]
        ids, mask, targets = (t.gather(1, order) for t in (input_ids, keep, labels))
        if self._reads_both_ways:
            # A column of padding: without any, its attention leaves the causal mask out and reads the answer ahead.
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
        """F: h_v and the text to next-token logits where there are labels.

        `text_inputs` is what else the family's forward takes: `token_type_ids`, `mm_token_type_ids`, `image_grid_thw`,
        ... Returns logits (N, L', vocabulary) and targets (N, L'), -100 where a row has no target. L' counts the
        columns in which any row has a label: logits of the others are never computed.

        Raises:
            ValueError: a row without labels, a sequence longer than the model's context, or not as many image tokens as
                features.
        """
        _check_labels(labels)
        if self._reads_both_ways and "token_type_ids" in self.text_keys:
            kinds = text_inputs.get("token_type_ids")
            if kinds is None or bool((kinds[labels != IGNORE] == 0).any()):
                what = "has no token_type_ids" if kinds is None else "has labels where token_type_ids is 0"
                raise ValueError(
                    f"the batch {what}; {type(self.model).__name__} reads ahead where they are 0 (prompt and image), "
                    "and must not in the response, where they are 1. Give the response to its processor as suffix"
                )
        if self.context is not None and input_ids.shape[1] > self.context:
            raise ValueError(
                f"a sample has {input_ids.shape[1]} tokens with its labels, the model's context is {self.context}; "
                "shorten the text or use a model with a longer context"
            )
        body: Any = self._body
        rotary = hasattr(body, "get_rope_index")  # positions in time, height and width, which the model counts itself
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
                body.rope_deltas = deltas  # a generation that is under way goes on from its own
        return output.logits, labels[:, 1:].index_select(1, columns)

    def losses(self, image_features: torch.Tensor, **text_inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """`task_loss` (N,), differentiable, and `is_right` (N,) of what `fuse` gives for the same arguments.

        Where the logits would be large, they are made and used in chunks of tokens (`token_losses`), equal to rounding:
        that takes an output layer whose output is the logits themselves, in a model that is not sharded.
        """
        head = self._in_chunks(image_features, text_inputs)
        if head is None:
            logits, targets = self.fuse(image_features, **text_inputs)
            return task_loss(logits, targets), is_right(logits.detach(), targets)
        read: list[torch.Tensor] = []

        def hand_on(hidden: torch.Tensor) -> torch.Tensor:
            read.append(hidden)
            return hidden

        with replaced({head: hand_on}):
            _, targets = self.fuse(image_features, **text_inputs)
        here = targets != IGNORE
        loss, right = token_losses(head, read[0][here], targets[here])
        place = here.nonzero(as_tuple=True)
        by_row = loss.new_zeros(here.shape).index_put(place, loss.to(here.device))
        wrong = torch.zeros_like(here).index_put(place, ~right.to(here.device))
        return by_row.sum(1) / here.sum(1), ~wrong.any(1)

    def _in_chunks(self, image_features: torch.Tensor, text_inputs: dict[str, Any]) -> nn.Module | None:
        """The output layer, where its logits are large and nothing stands between them and those of the model."""
        head: Any = self.model.get_output_embeddings() if self._vocabulary else None
        if head is None or not self._pays(head, int((text_inputs["labels"][:, 1:] != IGNORE).sum())):
            return None
        # Processes that share a model must run it equally often, and each would look at its layer when it needs to.
        sharded = any(isinstance(m, FSDPModule) for m in self.model.modules())
        random = any(isinstance(m, nn.Dropout) and m.p and m.training for m in head.modules())
        if sharded or random:
            return None
        if self._last is None or self._last[0] is not head:
            self._last = head, self._gives_the_logits(head, image_features, text_inputs)
        return head if self._last[1] else None

    def _pays(self, head: nn.Module, tokens: int) -> bool:
        """Whether the losses of so many tokens are worth chunks.

        Forward and backward of 1,024 tokens through a layer of 896 to 151,936 (one thread of a CPU, float32): 7.0 s and
        380 MiB against 6.6 s and 1,790 MiB where it is frozen, 13.5 s and 970 MiB against 8.9 s and 1,790 MiB where it
        is trained. There the gradient of its weights has the same size either way, and chunks pay beyond that.
        """
        trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
        return tokens * self._vocabulary >= max(_LARGE, trained)

    def _gives_the_logits(self, head: Any, image_features: torch.Tensor, text_inputs: dict[str, Any]) -> bool:
        """Whether the model hands on what its output layer gives, unscaled, uncapped, whole: by one forward pass, in
        which the layer gives numbers that are not to be mistaken for others."""
        given: list[torch.Tensor] = []

        def marked(hidden: torch.Tensor) -> torch.Tensor:
            if hidden.dim() != 3:
                return plain(hidden)  # tokens of all samples in one row are not what `fuse` has targets for
            logits = plain(hidden[:1, :1])
            given.append(torch.linspace(-50, 50, logits.numel()).to(logits).view_as(logits))
            return given[-1]

        plain = head.forward
        with unpacked(self.model), frozen(self.model), torch.no_grad(), replaced({head: marked}):
            logits, _ = self.fuse(image_features, **text_inputs)
        return len(given) == 1 and logits.shape == given[0].shape and torch.equal(logits, given[0].to(logits))

    def _crossing(self, image_features: torch.Tensor, input_ids: torch.Tensor) -> _Crossing:
        """What `get_image_features` gave, made again from h_v."""
        counts = (input_ids == self.model.config.image_token_id).sum(1)
        place = torch.arange(image_features.shape[1], device=counts.device)
        real = place < counts[:, None]
        # Padding is zero and features are not, so a token too many shows in a row with padding, too. A row without any
        # may hold zeros, and so may a whole sample: a caller may blank them.
        used = (image_features.detach().any(-1) * (place + 1)).amax(1) if len(place) else counts * 0
        wrong = (used > counts) | (counts > len(place)) | ((used > 0) & (used < counts) & (counts < len(place)))
        if len(counts) != len(image_features) or bool(wrong.any()):
            raise ValueError(
                f"h_v has {len(image_features)} rows of up to {real.shape[1]} tokens, and input_ids hold "
                f"{_several(counts.tolist())} image tokens (id {self.model.config.image_token_id}) a sample; expected "
                "as many tokens as features. Make text and images in one call of the model's own processor"
            )
        first, *deep = image_features[real].chunk(1 + self._deep, dim=-1)
        return _Crossing(_Packed([first]), [[d] for d in deep])


@dataclass
class _Crossing(ModelOutput):
    """What forward reads of an encoded image, in any family."""

    pooler_output: Any = None
    deepstack_features: Any = None
    qformer_outputs: Any = None
    vision_outputs: Any = None


class _Packed(list):
    """One tensor (tokens, width): some families concatenate a list of images, others move one tensor to a device."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self[0][None].to(*args, **kwargs)


def _pad_runs(packed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(sum of counts, ...) to (N, longest, ...), zero behind each row's own."""
    longest = int(counts.max()) if len(counts) else 0
    if bool((counts == longest).all()):
        return packed.reshape(len(counts), longest, *packed.shape[1:])
    padded = packed.new_zeros(len(counts), longest, *packed.shape[1:])
    real = torch.arange(longest, device=counts.device) < counts[:, None]
    return padded.index_put((real.nonzero(as_tuple=True)), packed)


def _several(values: Any) -> str:
    """A list, or `4 x 16` where all are the same."""
    values = list(values)
    return f"{len(values)} x {values[0]}" if len(set(values)) == 1 else str(values)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions counted over real tokens, so that padding does not shift a row: results do not depend on the batch."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def _check_labels(labels: torch.Tensor, first: int = 1) -> None:
    empty = ~(labels[:, first:] != IGNORE).any(1)
    if empty.any():
        after = " after its first token" if first else ""
        raise ValueError(
            f"row {int(empty.nonzero()[0])} of labels holds only -100{after}, so it has no target; "
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
