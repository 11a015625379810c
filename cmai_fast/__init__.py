"""cmai_fast measures, immunises and guards multimodal models; names load when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmai_fast.lazy import lazily

if TYPE_CHECKING:
    from cmai_fast.arm import ARMSchedule, Decision, Guard
    from cmai_fast.bridge import Bridge
    from cmai_fast.cmcv import ConsistencyHeads, Verifier
    from cmai_fast.mbat import MBATConfig, MBATTrainer, quantized_language_model
    from cmai_fast.pixels import PixelSpace
    from cmai_fast.threat import ThreatModel, parse_eps

__version__ = "0.1.0"

__all__ = [
    "ARMSchedule",
    "Bridge",
    "ConsistencyHeads",
    "Decision",
    "Guard",
    "MBATConfig",
    "MBATTrainer",
    "PixelSpace",
    "ThreatModel",
    "Verifier",
    "__version__",
    "parse_eps",
    "quantized_language_model",
]

__getattr__ = lazily(
    __name__,
    {
        "ARMSchedule": "arm",
        "Bridge": "bridge",
        "ConsistencyHeads": "cmcv",
        "Decision": "arm",
        "Guard": "arm",
        "MBATConfig": "mbat",
        "MBATTrainer": "mbat",
        "PixelSpace": "pixels",
        "ThreatModel": "threat",
        "Verifier": "cmcv",
        "parse_eps": "threat",
        "quantized_language_model": "mbat",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
