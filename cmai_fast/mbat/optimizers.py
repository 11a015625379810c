"""Further optimizers: Muon for the model, and a separate one for the consistency heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cmai_fast.mbat.adapters import low_rank_parameters
from cmai_fast.mbat.config import MBATConfig
from cmai_fast.mbat.muon import MuonAdamW, hidden_matrices


def muon(model: nn.Module, args: MBATConfig, decayed: set[str]) -> MuonAdamW:
    """MuonAdamW over the trainable parameters; `decayed` names those with weight decay."""
    # Not for LoRA: orthogonal updates of its two factors are not an orthogonal update of their product.
    matrices = set(hidden_matrices(model)) - low_rank_parameters(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p in matrices, name in decayed].append(p)

    def parameter_groups(muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": groups[muon, decay], "weight_decay": args.weight_decay if decay else 0.0}
            for decay in (True, False)
        ]

    return MuonAdamW(
        parameter_groups(True),
        parameter_groups(False),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def for_heads(
    heads: nn.Module, args: MBATConfig, named: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None
) -> torch.optim.Optimizer:
    """An optimizer over the heads, without weight decay.

    Args:
        named: class and settings of `args.optim`, or None if the model has another optimizer. It is used if it is
            PyTorch's own; others may need a model or treat rows of a matrix separately, so AdamW replaces them.
    """
    group = {"params": list(heads.parameters()), "lr": args.heads_learning_rate, "weight_decay": 0.0}
    kind, settings = named or (torch.optim.AdamW, {})
    if not (isinstance(kind, type) and kind.__module__.startswith("torch.optim.")):
        kind, settings = torch.optim.AdamW, {}
    if not settings:
        settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return kind([group], **settings)


def step_behind(optimizer: torch.optim.Optimizer, own: torch.optim.Optimizer, args: MBATConfig) -> Callable[..., None]:
    """A function to call after each step of `optimizer`: steps `own`, at `heads_learning_rate` scaled by the schedule.

    The schedule is that of the first parameter group. The gradients of `own` are cleared afterwards, since Trainer
    clears only those of its model.
    """
    first = optimizer.param_groups[0]
    start = first.get("initial_lr", first["lr"])  # an existing scheduler may have started its warm-up

    def step(*_: Any) -> None:
        part = optimizer.param_groups[0]["lr"] / start if start else 1.0
        for group in own.param_groups:
            group["lr"] = args.heads_learning_rate * part
        own.step()
        own.zero_grad()

    return step
