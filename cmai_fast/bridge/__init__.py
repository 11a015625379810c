"""The three-part view (E_v, E_t, F) of a model."""

from cmai_fast.bridge.activations import lean_activations
from cmai_fast.bridge.bridge import Bridge, is_right, task_loss
from cmai_fast.bridge.choose import bridge_of
from cmai_fast.bridge.dual import DualBridge
from cmai_fast.bridge.encoder_decoder import EncoderDecoderBridge
from cmai_fast.bridge.frozen import frozen
from cmai_fast.bridge.images import BatchImages
from cmai_fast.bridge.packed import unpack, unpacked
from cmai_fast.bridge.patches import patches_by_matmul
from cmai_fast.bridge.recompute import recomputed, set_recompute

__all__ = [
    "BatchImages",
    "Bridge",
    "DualBridge",
    "EncoderDecoderBridge",
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
