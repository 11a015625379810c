"""What a model computes and stores per sample, from its config: the model is built on the meta device, without weights.

Everything is read off the layers: the shapes of their linear layers say how much a token costs in time (2 operations
per weight) and in memory (autograd stores what the products give and take).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from cmai_fast.bridge import DualBridge, EncoderDecoderBridge, bridge_of

_ANY_SIZE = 448  # pixels, where a model takes pictures of any size and none is given


@dataclass(frozen=True)
class Layer:
    """Sums over the linear layers of one transformer layer, in elements per token.

    Attributes:
        weights: of all matrices; given, taken: widths of all outputs and of all inputs; width: of the residual stream.
        tokens: of a sample that pass through it.
        window: tokens that attend to each other.
    """

    weights: int
    given: int
    taken: int
    width: int
    tokens: int
    window: int

    @property
    def flops(self) -> float:
        """Of a forward pass of a sample: products with weights, then those of attention."""
        return self.tokens * (2 * self.weights + 4 * self.window * self.width)

    def stored(self, element: int, trained: bool) -> float:
        """Bytes that autograd stores of a sample, with `lean_activations`.

        The outputs of all products but the two that end in the residual stream, the output of attention, and the inputs
        of two norms, which are float32. To train the weights, also the inputs of products (that of attention's last
        one is its output, which is there).
        """
        elements = self.given - self.width + (self.taken - self.width if trained else 0)
        return self.tokens * (elements * element + 2 * self.width * 4)

    def stored_selectively(self, element: int) -> float:
        """Bytes that `recompute="selective"` keeps: its input, and the outputs of products and of attention."""
        return self.tokens * (self.given + 2 * self.width) * element


@dataclass
class Side:
    """The vision or the language side: its layers, and what else it computes per sample (`rest`, FLOPs)."""

    layers: list[Layer] = field(default_factory=list)
    rest: float = 0.0
    weights: int = 0  # parameters, all of them
    quantisable: int = 0  # those in linear layers of a language model

    @property
    def flops(self) -> float:
        return self.rest + sum(layer.flops for layer in self.layers)


@dataclass(frozen=True)
class ModelSizes:
    """`vision` and `language` of one sample; `text` is the share of the language side's tokens that are no image's;
    `logits`: elements of a sample; `image_tokens`, `tokens`: of the language side's sequence."""

    vision: Side
    language: Side
    image_tokens: int
    tokens: int
    text: float
    logits: int
    notes: tuple[str, ...]

    @property
    def verifier(self) -> Side:
        """What a verifier of the default size computes per statement: a text of this model's, and one layer."""
        width = 128  # of `VerifyNetwork`, with a layer of 3 + 1 products for attention and 2 of twice that width
        words = max(1, round(self.tokens * self.text))
        layer = Layer(8 * width**2, 7 * width, 5 * width, width, words, words)
        return Side([layer], weights=layer.weights)


def model_sizes(
    config: Any, *, prompt: int = 32, answer: int = 8, image_size: int | None = None, tiles: int = 1
) -> ModelSizes:
    """The sizes of the model of a `transformers` config.

    Args:
        prompt, answer: tokens of a sample's text beside its image's, and of them those with a label.
        image_size: pixels of a side; None: the config's, or 448 where it has none.
        tiles: pictures of that size that a sample is cut into (LLaVA-NeXT, InternVL, Idefics3).

    Raises:
        ValueError: the model cannot be bridged, or is not made of transformer layers with linear layers; an image is
            too small.
    """
    model = _empty(config)
    bridge: Any = bridge_of(model, empty=True)
    dual, crossed = isinstance(bridge, DualBridge), isinstance(bridge, EncoderDecoderBridge)
    side = image_size or _first(bridge.image_size)
    notes = [] if side else [f"pictures of {_ANY_SIZE} x {_ANY_SIZE} (set the size of an image for others)"]
    tower, *after = bridge.vision_side
    patches = ((side or _ANY_SIZE) // _patch(tower)) ** 2
    out = 1 if dual else _image_tokens(model.config, patches)
    if not patches or not out:
        raise ValueError(
            f"image_size is {side}, of which the model makes no image token; expected several times the "
            f"{_patch(tower)} pixels of a patch's side"
        )
    tokens = 0 if dual else prompt + answer + (0 if crossed else out * tiles)
    vision, language = Side(), Side()
    summary = any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())
    _add(vision, tower, patches, out, tiles, summary)
    for part in after:
        _add(vision, part, out, out, tiles)
    vision.weights = sum(p.numel() for p in bridge.vision_parameters)
    language.weights = sum(p.numel() for p in model.parameters()) - vision.weights
    logits = 0
    if dual:
        notes.append("a fixed set of texts, encoded once: the text side costs nothing")
    else:
        _add(language, bridge.text_model, tokens, 0, 1)
        head = model.get_output_embeddings()
        logits = answer * head.weight.shape[0]
        language.rest += 2 * answer * head.weight.numel()
        language.quantisable = sum(m.weight.numel() for m in bridge.text_model.modules() if isinstance(m, nn.Linear))
    share = (prompt + answer) / tokens if tokens else 0.0
    return ModelSizes(vision, language, out * tiles, tokens, share, logits, tuple(notes))


def _empty(config: Any) -> Any:
    kinds = (AutoModelForImageTextToText, AutoModel)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise ValueError(
            f"a {type(config).__name__} (model_type {config.model_type!r}) is the config of no image-text model of "
            "transformers; name one that cmai-fast attack takes"
        )
    with torch.device("meta"):
        return kind.from_config(config)


def _add(side: Side, part: nn.Module, tokens: int, out: int, tiles: int, summary: int = 0) -> None:
    """Adds the layers of `part`, which see `tokens` of each tile and `summary` more, and its other products:
    convolutions cut the picture into as many patches, and linear layers make its `out` tokens."""
    layers = [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]
    layers = [
        m for m in layers if not any(m is inner for other in layers if other is not m for inner in other.modules())
    ]
    inside = {id(m) for layer in layers for m in layer.modules()}
    if not layers and sum(isinstance(m, nn.Conv2d) for m in part.modules()) > 1:
        raise ValueError(
            f"{type(part).__name__} has no transformer layers, whose cost alone is known here; time a few steps instead"
        )
    side.layers += [_layer(layer, (tokens + summary) * tiles, tokens + summary) for layer in layers]
    for module in part.modules():
        if id(module) not in inside and isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            side.rest += 2 * module.weight.numel() * tiles * (out if isinstance(module, nn.Linear) else tokens)


def _layer(layer: nn.Module, tokens: int, window: int) -> Layer:
    shapes = [_shape(m) for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))]
    weights, parameters = sum(a * b for a, b in shapes), sum(p.numel() for p in layer.parameters())
    if weights < 0.8 * parameters:
        raise ValueError(
            f"{weights:,} of {parameters:,} parameters of a {type(layer).__name__} are in linear layers; the cost of "
            "others, such as experts, is not known here; time a few steps instead"
        )
    return Layer(weights, sum(b for _, b in shapes), sum(a for a, _ in shapes), shapes[0][0], tokens, window)


def _shape(linear: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    a, b = linear.weight.shape
    return (a, b) if isinstance(linear, Conv1D) else (b, a)


def _patch(tower: nn.Module) -> int:
    cut = next((m for m in tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if cut is None:
        raise ValueError(f"{type(tower).__name__} cuts pictures by no convolution, so its patches cannot be counted")
    return int(cut.kernel_size[-1])


def _image_tokens(config: Any, patches: int) -> int:
    """Tokens of a picture on the language side, under the names that families have for it."""
    vision = getattr(config, "vision_config", None)
    for owner, name, tokens in (
        (config, "num_query_tokens", lambda n: n),  # BLIP-2
        (config, "mm_tokens_per_image", lambda n: n),  # Gemma 3
        (vision, "spatial_merge_size", lambda n: patches // n**2),  # Qwen-VL
        (config, "scale_factor", lambda n: patches // n**2),  # Idefics3, SmolVLM
        (config, "downsample_ratio", lambda n: math.floor(patches * n**2)),  # InternVL
    ):
        value = getattr(owner, name, None)
        if value:
            return int(tokens(value))
    return patches


def _first(size: Any) -> int | None:
    return size[0] if isinstance(size, (list, tuple)) else size
