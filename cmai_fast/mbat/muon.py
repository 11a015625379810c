"""Muon for the hidden matrices and AdamW for the rest, as one optimiser that `Trainer` can schedule, save and resume.

Muon (Jordan et al., 2024; `torch.optim.Muon`) makes the update of a matrix orthogonal. Robust features are learned from
a weak signal spread over many directions, and it does not leave them to the largest ones. It steps matrices only:
embeddings, the output layer, convolutions, norms and biases are AdamW's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel


class MuonAdamW(torch.optim.Optimizer):
    """Steps `matrices` by `torch.optim.Muon` and `others` by `torch.optim.AdamW`.

    Args:
        matrices: 2-d parameters; their update has the RMS of AdamW's, so both share `lr` and `weight_decay`.
        others: parameters of any shape; groups added later are AdamW's as well.
        lr, weight_decay: of both.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._muon = torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr, betas, eps, weight_decay)
        groups = [
            group | {"muon": muon is self._muon} for muon in (self._muon, self._adamw) for group in muon.param_groups
        ]
        super().__init__(groups, {**self._adamw.defaults, "muon": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, muon in ((self._muon, True), (self._adamw, False)):
            # Groups and state are this optimiser's own, so that schedulers and checkpoints see one plain optimiser.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            part.step()
        return loss


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of `model`'s linear layers, but for the output layer, whose rows are tokens."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    return [cast(nn.Parameter, m.weight) for m in linear if m.weight.requires_grad]
