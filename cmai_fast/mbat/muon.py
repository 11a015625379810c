"""Muon for hidden matrices and AdamW for the rest, as one optimiser that `Trainer` can schedule, save and resume.

Muon (Jordan et al., 2024; `torch.optim.Muon`) makes the update of a matrix orthogonal. Robust features are learned from
a weak signal spread over many directions, and an orthogonal update is not dominated by the largest ones. It updates
matrices only: embeddings, the output layer, convolutions, norms and biases use AdamW.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Steps `matrices` by `torch.optim.Muon` and `others` by `torch.optim.AdamW`.

    Args:
        matrices: parameter groups, as PyTorch's optimisers take them, of 2-d parameters; their update has the RMS of
            AdamW's, so both kinds share `lr`.
        others: parameter groups of any shape; groups added later use AdamW too.
        lr, weight_decay: for groups without their own.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        matrices, others = ([g for g in groups if g["params"]] for groups in (matrices, others))
        groups: list[dict[str, Any]] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
            groups += [group | {"muon": True} for group in muon.param_groups]
        # AdamW needs parameters, and its defaults are needed for groups added later.
        adamw = torch.optim.AdamW(others or [{"params": [nn.Parameter(torch.empty(0))]}], lr, betas, eps, weight_decay)
        groups += [group | {"muon": False} for group in adamw.param_groups] if others else []
        super().__init__(groups, {**adamw.defaults, "muon": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, muon in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
            groups = [group for group in self.param_groups if group["muon"] is muon]
            if groups:
                # Made for this step, with the groups and state of this optimiser, which schedulers and checkpoints see.
                part = kind(groups)
                part.state = self.state
                part.step()
        return loss


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of `model`'s linear layers, each once, except those whose rows are tokens."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tokens = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) or m is output}
    linear = [cast(nn.Parameter, m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    return [w for w in dict.fromkeys(linear) if w.requires_grad and w not in tokens]
