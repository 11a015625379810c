"""The losses of a batch through the output layer in chunks of tokens, if its logits would be large.

`token_loss.py` has the computation; this file decides when it can and should replace the model's own logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cmai_fast.bridge.frozen import frozen
from cmai_fast.bridge.labels import IGNORE
from cmai_fast.bridge.packed import unpacked
from cmai_fast.bridge.protocol import ModelBridge
from cmai_fast.bridge.replaced import replaced
from cmai_fast.bridge.token_loss import token_losses

_LARGE = 1 << 26  # logits that take a quarter of a GiB in float32, and several times that in the loss


class OutputLayer:
    """The output layer of a generative model with `vocabulary` words."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._last: tuple[nn.Module, bool] | None = None  # the layer, and whether its output is the model's logits

    def losses(
        self, bridge: ModelBridge, image_features: Tensor, text_inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """`task_loss` and `is_right` (N,) of the result of `bridge.fuse`, equal up to rounding. None if the model's own
        logits have to be used: they are small, they are not the layer's output, or the model is sharded."""
        head = self._in_chunks(bridge, image_features, text_inputs)
        if head is None:
            return None
        read: list[Tensor] = []

        def pass_through(hidden: Tensor) -> Tensor:
            read.append(hidden)
            return hidden

        with replaced({head: pass_through}):
            _, targets = bridge.fuse(image_features, **text_inputs)
        here = targets != IGNORE
        loss, right = token_losses(head, read[0][here], targets[here])
        place = here.nonzero(as_tuple=True)
        by_row = loss.new_zeros(here.shape).index_put(place, loss.to(here.device))
        wrong = torch.zeros_like(here).index_put(place, ~right.to(here.device))
        return by_row.sum(1) / here.sum(1), ~wrong.any(1)

    def _in_chunks(self, bridge: ModelBridge, image_features: Tensor, text_inputs: dict[str, Any]) -> nn.Module | None:
        """The layer, if its logits are large and identical to the model's; else None."""
        head: Any = bridge.model.get_output_embeddings()
        if head is None or not self._pays(head, int((text_inputs["labels"][:, 1:] != IGNORE).sum())):
            return None
        # Processes that share a model must run it equally often, but each would test its layer at a different time.
        sharded = any(isinstance(m, FSDPModule) for m in bridge.model.modules())
        random = any(isinstance(m, nn.Dropout) and m.p and m.training for m in head.modules())
        if sharded or random:
            return None
        if self._last is None or self._last[0] is not head:
            self._last = head, _gives_the_logits(bridge, head, image_features, text_inputs)
        return head if self._last[1] else None

    def _pays(self, head: nn.Module, tokens: int) -> bool:
        """Whether chunks are worth it for this number of tokens.

        Forward and backward of 1,024 tokens through a layer of 896 to 151,936 (one thread of a CPU, float32): 7.0 s and
        380 MiB against 6.6 s and 1,790 MiB if it is frozen, 13.5 s and 970 MiB against 8.9 s and 1,790 MiB if it is
        trained. Then the gradient of its weights has the same size either way, and chunks are worth it only beyond.
        """
        trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
        return tokens * self._vocabulary >= max(_LARGE, trained)


def _gives_the_logits(bridge: ModelBridge, head: Any, image_features: Tensor, text_inputs: dict[str, Any]) -> bool:
    """Whether the model returns the output of its output layer unscaled, uncapped and complete. Tested by one forward
    pass in which the layer returns marker values."""
    given: list[Tensor] = []

    def marked(hidden: Tensor) -> Tensor:
        if hidden.dim() != 3:
            return plain(hidden)  # `fuse` has no targets for tokens of all samples in one row
        logits = plain(hidden[:1, :1])
        given.append(torch.linspace(-50, 50, logits.numel()).to(logits).view_as(logits))
        return given[-1]

    plain = head.forward
    with unpacked(bridge.model), frozen(bridge.model), torch.no_grad(), replaced({head: marked}):
        logits, _ = bridge.fuse(image_features, **text_inputs)
    return len(given) == 1 and logits.shape == given[0].shape and torch.equal(logits, given[0].to(logits))
