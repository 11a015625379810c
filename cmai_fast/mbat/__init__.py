"""Modality-Bridging Adversarial Training: configuration, trainer, and the solvers of its inner problem."""

from cmai_fast.mbat.checkpoints import last_checkpoint
from cmai_fast.mbat.config import MBATConfig
from cmai_fast.mbat.inner import SOLVERS, InnerResult, maximise
from cmai_fast.mbat.quantized import quantized_language_model
from cmai_fast.mbat.trainer import MBATTrainer

__all__ = [
    "SOLVERS",
    "InnerResult",
    "MBATConfig",
    "MBATTrainer",
    "last_checkpoint",
    "maximise",
    "quantized_language_model",
]
