"""Attacks as their papers write them, in eager PyTorch on the whole model: no bridge, no operators, no compaction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cmai_fast import ops
from cmai_fast.threat import ThreatModel
from own_answers import Case


def start_of(case: Case, threat: ThreatModel, seed: int) -> Tensor:
    """The random start of each sample: the one thing that is shared with the attacks under test."""
    start = torch.empty_like(case.clean)
    eps = torch.full((len(case.clean),), threat.eps, dtype=case.clean.dtype)
    ops.random_start_(start, case.clean, eps, case.sample_ids, seed, threat.norm)
    return start


def look(case: Case, pixels: Tensor, rows: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (n,), whether greedily right (n,), and d loss / d pixels of images (n, 3, H, W) in [0, 1]."""
    batch = case.batch(rows)
    mean = case.space.mean.to(pixels).view(3, 1, 1)
    std = case.space.std.to(pixels).view(3, 1, 1)
    x = pixels.detach().clone().requires_grad_()
    mask = batch["attention_mask"]
    logits = case.model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        pixel_values=(x - mean) / std,
    ).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    losses, right = [], []
    for i in range(len(x)):
        at = targets[i] != -100
        losses.append(F.cross_entropy(logits[i][at], targets[i][at]))
        right.append(bool((logits[i][at].argmax(-1) == targets[i][at]).all()))
    loss = torch.stack(losses)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), torch.tensor(right), grad


def project(x: Tensor, clean: Tensor, threat: ThreatModel) -> Tensor:
    delta = x - clean
    if threat.norm == "linf":
        delta = delta.clamp(-threat.eps, threat.eps)
    else:
        norm = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = torch.where(norm > threat.eps, delta * threat.eps / norm, delta)
    return (clean + delta).clamp(0, 1)


def ascent(grad: Tensor, threat: ThreatModel) -> Tensor:
    return grad.sign() if threat.norm == "linf" else grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def plain_pgd(
    case: Case, threat: ThreatModel, start: Tensor, steps: int, size: float, decay: float | None = None
) -> list[Tensor]:
    """All iterates x_0 .. x_steps (N, 3, H, W); `decay` is the mu of MI-FGSM (Dong et al., 2018, algorithm 1)."""
    iterates, x, g = [start], start, torch.zeros_like(start)
    for _ in range(steps):
        grad = look(case, x)[2]
        if decay is not None:
            g = decay * g + grad / grad.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
            grad = g
        x = project(x + size * ascent(grad, threat), case.clean, threat)
        iterates.append(x)
    return iterates


def plain_apgd(
    value_and_grad: Callable[[Tensor], tuple[float, Tensor]],
    clean: Tensor,
    start: Tensor,
    threat: ThreatModel,
    steps: int,
) -> tuple[list[Tensor], list[int]]:
    """Croce and Hein (2020), algorithm 1, for one sample (1, 3, H, W): iterates as evaluated, checkpoints that halved.

    Line by line, with whole histories kept; x^(k) may be overwritten by x_max after its evaluation at checkpoint k.
    """
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(round(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06), 2))
    w = [math.ceil(round(share * steps, 6)) for share in p if share <= 1]

    eta, alpha = 2 * threat.eps, 0.75
    value, grad = value_and_grad(start)
    x, f, g = [start], [value], [grad]  # what the algorithm holds
    evaluated, halved = [start], []
    best = (value, start, grad)
    f_max_at = {0: value}
    rises = 0
    for k in range(steps):
        z = project(x[k] + eta * ascent(g[k], threat), clean, threat)
        following = z if k == 0 else project(x[k] + alpha * (z - x[k]) + (1 - alpha) * (x[k] - x[k - 1]), clean, threat)
        value, grad = value_and_grad(following)
        evaluated.append(following)
        rises += value > f[k]
        if value > best[0]:
            best = (value, following, grad)
        x.append(following)
        f.append(value)
        g.append(grad)
        if k + 1 in w[1:]:
            last = w[w.index(k + 1) - 1]
            f_max_at[k + 1] = best[0]
            condition_1 = rises < 0.75 * (k + 1 - last)
            condition_2 = last not in halved and f_max_at[last] == f_max_at[k + 1]
            if condition_1 or condition_2:
                eta /= 2
                halved.append(k + 1)
                f[-1], x[-1], g[-1] = best
            rises = 0
    return evaluated, halved
