"""cmai_fast measures, immunises and guards multimodal models; names load when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmai_fast.arm import ARMSchedule, Decision, Guard
    from cmai_fast.bridge import Bridge
    from cmai_fast.cmcv import ConsistencyHeads
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
    "__version__",
    "parse_eps",
    "quantized_language_model",
]

_HOMES = {
    "ARMSchedule": "cmai_fast.arm",
    "Bridge": "cmai_fast.bridge",
    "ConsistencyHeads": "cmai_fast.cmcv",
    "Decision": "cmai_fast.arm",
    "Guard": "cmai_fast.arm",
    "MBATConfig": "cmai_fast.mbat",
    "MBATTrainer": "cmai_fast.mbat",
    "PixelSpace": "cmai_fast.pixels",
    "ThreatModel": "cmai_fast.threat",
    "parse_eps": "cmai_fast.threat",
    "quantized_language_model": "cmai_fast.mbat",
}


def __getattr__(name: str) -> Any:
    # PyTorch and transformers take seconds to import; a command's --help should not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
