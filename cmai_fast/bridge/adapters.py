"""Models with PEFT adapters (LoRA): these are inside the layers, so the parts of a model include them."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model of `transformers` inside a `PeftModel`, with its adapters; any other model unchanged.

    Raises:
        ValueError: an adapter that acts outside the layers, in the wrapper's own forward.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    if not configs:
        return model
    peft: Any = sys.modules["peft"]  # imported, since the model has an adapter
    wrapped = isinstance(model, peft.PeftModel)
    tuner: Any = model.base_model if wrapped else None
    for name, config in configs.items():
        # Prompt-learning methods have no tuner: the wrapper puts the prompt before the text.
        outside = wrapped and type(tuner).forward is not peft.tuners.tuners_utils.BaseTuner.forward
        if outside or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"the adapter {name!r} is of type {config.peft_type.value} ({type(config).__name__}), which changes "
                "the forward pass of the whole model; attacks and training run its parts one by one and would miss it. "
                "Expected one inside the layers, such as LoraConfig"
            )
    return tuner.model if wrapped else model
