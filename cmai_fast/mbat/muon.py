"""Muon for hidden matrices and AdamW for the rest, as one optimiser that `Trainer` can schedule, save and resume.

Muon (Jordan et al., 2024; `torch.optim.Muon`) makes the update of a matrix orthogonal. Robust features are learned from
a weak signal spread over many directions, and an orthogonal update is not dominated by the largest ones. It updates
matrices only: embeddings, the output layer, convolutions, norms and biases use AdamW.

`torch.optim.Muon` makes updates orthogonal in bfloat16, also where the processor has no such arithmetic: on a CPU with
AVX2 the 47 matrices of `easyvqa-llava` take 1.6 s per step, three times as long as the rest of an adversarial step. On
CPUs they are made orthogonal in float32 here, which takes 0.07 s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor, nn

# Of matrices that are made orthogonal together, which takes a few times their memory.
_ELEMENTS = 1 << 24


class MuonAdamW(torch.optim.Optimizer):
    """Steps `matrices` as `torch.optim.Muon` does, and `others` by `torch.optim.AdamW`.

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
        if others := [group for group in self.param_groups if not group["muon"]]:
            # Made for this step, with the groups and state of this optimiser, which schedulers and checkpoints see.
            part = torch.optim.AdamW(others)
            part.state = self.state
            part.step()
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """The step of `torch.optim.Muon`, whose defaults the group has; of matrices of one shape together."""
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for p in (p for p in group["params"] if p.grad is not None):
            alike[p.shape, p.device, p.dtype].append(p)
        for (shape, *_), parameters in alike.items():
            at_once = max(1, _ELEMENTS // shape.numel())
            for start in range(0, len(parameters), at_once):
                self._step_alike(group, parameters[start : start + at_once])

    def _step_alike(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        kept = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(kept, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, kept, group["momentum"]) if group["nesterov"] else kept
        shape, device = parameters[0].shape, parameters[0].device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        stacked = torch.stack([update.to(dtype) for update in updates])
        directions = orthogonal(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * math.sqrt(max(shape))
        torch._foreach_add_(parameters, directions.to(parameters[0].dtype).unbind(), alpha=-rate)


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest orthogonal matrices (N, m, n), roughly: singular values end up between 0.5 and 1.5.

    `steps` of the quintic Newton-Schulz iteration a X + (b X X^T + c (X X^T)^2) X (Jordan et al., 2024), in the dtype
    of `matrices`.
    """
    a, b, c = coefficients
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of `model`'s linear layers, each once, except those whose rows are tokens."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tokens = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) or m is output}
    linear = [cast(nn.Parameter, m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    return [w for w in dict.fromkeys(linear) if w.requires_grad and w not in tokens]
