"""Attacks that do what a test says, in place of those of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cmai_fast.attacks import ATTACKS, AttackResult, Passes
from cmai_fast.threat import ThreatModel

ANY = ThreatModel("linf", 1.0)  # a ball that holds every image


def planted(monkeypatch, name: str, images: Mapping[int, Tensor], claims=None) -> list[list[int]]:
    """`ATTACKS[name]` gives these images (C, H, W) to the sample ids that they are for, and leaves others untouched.

    It claims to fool those, or the ids in `claims`. Returns the ids of each call, as they come.
    """
    seen: list[list[int]] = []

    def run(victim, clean, threat, *, steps, restarts, seed, sample_ids, **_):
        ids = sample_ids.tolist()
        seen.append(ids)
        adv = torch.stack([images.get(i, own) for i, own in zip(ids, clean, strict=True)])
        fooled = torch.tensor([i in (images if claims is None else claims) for i in ids])
        nothing = torch.zeros(len(clean), dtype=torch.int64)
        return AttackResult(adv, fooled, torch.zeros(len(clean)), Passes(full_forward=steps), nothing, nothing.clone())

    monkeypatch.setitem(ATTACKS._things, name, replace(ATTACKS[name], run=run))
    return seen
