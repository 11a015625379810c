"""The collator of a model's family."""

from __future__ import annotations

from typing import Any

from cmai_fast.bridge import DualBridge, EncoderDecoderBridge, ModelBridge
from cmai_fast.data.captions import CaptionCollator
from cmai_fast.data.choices import ChoiceCollator
from cmai_fast.data.collate import VQACollator
from cmai_fast.data.statements import Told

Collator = VQACollator | ChoiceCollator | CaptionCollator


def collator_of(
    bridge: ModelBridge, processor: Any, negatives: int = 0, seed: int = 0, statements: Told | None = None
) -> Collator:
    """The collator of a bridge's model; `negatives`, `seed`, `statements` as of `VQACollator`."""
    return collator(kind_of(bridge), processor, negatives, bridge.context, seed, statements)


def kind_of(bridge: ModelBridge) -> type[Collator]:
    """`ChoiceCollator` for a dual encoder, `CaptionCollator` for an encoder-decoder, `VQACollator` for all others."""
    if isinstance(bridge, DualBridge):
        return ChoiceCollator
    return CaptionCollator if isinstance(bridge, EncoderDecoderBridge) else VQACollator


def collator(
    kind: type[Collator],
    processor: Any,
    negatives: int = 0,
    context: int | None = None,
    seed: int = 0,
    statements: Told | None = None,
) -> Collator:
    """A collator of this kind; a `ChoiceCollator` has no use for what follows the processor."""
    if issubclass(kind, ChoiceCollator):
        return kind(processor)
    return kind(processor, negatives, context, seed, statements=statements)
