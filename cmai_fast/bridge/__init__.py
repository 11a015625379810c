"""The three-part view (E_v, E_t, F) of a model."""

from cmai_fast.bridge.bridge import Bridge, is_right, task_loss
from cmai_fast.bridge.frozen import frozen

__all__ = ["Bridge", "frozen", "is_right", "task_loss"]
