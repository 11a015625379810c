"""An attack: every pixel moves towards one shade of grey, as far as the ball allows."""

import torch

from cmai_fast.attacks import AttackResult, Passes, attack


@attack("grey-out", label="Grey-out", steps=1, threats=("linf",))
def grey_out(victim, clean, threat, *, steps, restarts, seed, sample_ids, shade: float = 0.5):
    adv = clean + (shade - clean).clamp(-threat.eps, threat.eps)
    fooled = ~victim.right(adv)
    none = torch.zeros(len(clean), dtype=torch.int64)
    return AttackResult(adv, fooled, fooled.to(clean), Passes(full_forward=1), none, none)
