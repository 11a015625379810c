"""The vision side as CUDA graphs, for attacks: forward and backward of a batch are one launch each.

A step of an attack on the image launches some thousand small kernels, which takes the CPU longer than the GPU takes to
run them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmai_fast.bridge.protocol import ModelBridge

_MOST = 2  # shapes of batches: a graph keeps the memory that its batch needs


class EncoderGraphs:
    """E_v of the shapes of batches that were seen last, captured once each.

    A graph computes what the model computes, from its weights as they are at each launch. It is captured again if
    weights are stored elsewhere, and holds only where nothing depends on the values of a batch: one image per sample.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[Any, ...], Callable[[Tensor], Tensor]] = OrderedDict()

    def of(self, bridge: ModelBridge, model_input: Tensor) -> Callable[[Tensor], Tensor]:
        """`bridge.encode_image` for images like `model_input` (N, C, H, W), on a GPU, whose gradient is asked for.

        The model has to be in attack mode, now and whenever the result is called. Features are overwritten by the next
        call, and gradients by the next backward pass.
        """
        precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        places = tuple(p.data_ptr() for p in bridge.vision_parameters)
        key = (tuple(model_input.shape), model_input.dtype, precision, places)
        if key not in self._made:
            while len(self._made) >= _MOST:
                self._made.popitem(last=False)
            sample = model_input.detach().clone().requires_grad_()
            # A cache of cast weights would be filled by the capture, and be wrong after the next optimizer step.
            with torch.autocast("cuda", precision[1], precision[0], cache_enabled=False):
                self._made[key] = _captured(bridge, sample)
        self._made.move_to_end(key)
        return self._made[key]


def _captured(bridge: ModelBridge, sample: Tensor) -> Any:
    try:
        return torch.cuda.make_graphed_callables(bridge.encode_image, (sample,))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the vision side of {type(bridge.model).__name__} cannot be captured as a CUDA graph "
            f"({str(error).splitlines()[0]}); set cuda_graphs to False (--no-cuda-graphs)"
        ) from error
