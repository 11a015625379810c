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
    """`ChoiceCollator` for a dual encoder, which has no use for the other arguments; `CaptionCollator` for an
    encoder-decoder; `VQACollator` for all others.

    Args:
        negatives, seed, statements: as of `VQACollator`.
    """
    if isinstance(bridge, DualBridge):
        return ChoiceCollator(processor)
    kind = CaptionCollator if isinstance(bridge, EncoderDecoderBridge) else VQACollator
    return kind(processor, negatives, bridge.context, seed, statements=statements)
