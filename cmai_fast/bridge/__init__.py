"""The three-part view (E_v, E_t, F) of a model."""

import torch as _torch
import transformers as _transformers

from cmai_fast.bridge.activations import lean_activations
from cmai_fast.bridge.bridge import Bridge
from cmai_fast.bridge.choose import SUPPORTED, bridge_of
from cmai_fast.bridge.dual import DualBridge
from cmai_fast.bridge.encoder_decoder import EncoderDecoderBridge
from cmai_fast.bridge.frozen import frozen
from cmai_fast.bridge.images import BatchImages
from cmai_fast.bridge.labels import is_right, task_loss
from cmai_fast.bridge.packed import unpack, unpacked
from cmai_fast.bridge.patches import patches_by_matmul
from cmai_fast.bridge.protocol import ModelBridge
from cmai_fast.bridge.recompute import recomputed, set_recompute
from cmai_fast.versions import warn_about_untested as _warn_about_untested

__all__ = [
    "SUPPORTED",
    "BatchImages",
    "Bridge",
    "DualBridge",
    "EncoderDecoderBridge",
    "ModelBridge",
    "bridge_of",
    "frozen",
    "is_right",
    "lean_activations",
    "patches_by_matmul",
    "recomputed",
    "set_recompute",
    "task_loss",
    "unpack",
    "unpacked",
]

# Everything that depends on these two imports this package, and a package is imported once.
_warn_about_untested({"torch": _torch.__version__, "transformers": _transformers.__version__})
