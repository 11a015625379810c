"""What attacks without a bound share: they take uploaded pictures, and say how much of a picture they changed."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cmai_fast.attacks.upload import UploadVictim
from cmai_fast.attacks.victim import Victim


def uploads(victim: Victim, name: str) -> UploadVictim:
    """The victim, for the attack `name`, which needs the pictures themselves.

    Raises:
        ValueError: it knows the model's input only.
    """
    if not isinstance(victim, UploadVictim):
        raise ValueError(
            f"{name} changes the picture that is uploaded, and the victim has the model's input; expected UploadVictim "
            "(on the command line: --threat upload)"
        )
    return victim


def visible(victim: UploadVictim, clean: Tensor, adv: Tensor) -> dict[str, list[float]]:
    """How visible a change is, per sample, in 8-bit levels over all pixels and channels of its pictures.

    `delta_mean`, `delta_max`: the mean and the largest change. `changed`: the share of pixels that differ at all.
    """
    found: dict[str, list[float]] = {"delta_mean": [], "delta_max": [], "changed": []}
    for before, after in zip(victim.pictures(clean), victim.pictures(adv), strict=True):
        pairs = zip(before, after, strict=True)
        apart = np.concatenate([np.abs(b.astype(int) - a.astype(int)).reshape(-1, 3) for b, a in pairs])
        found["delta_mean"].append(float(apart.mean()))
        found["delta_max"].append(float(apart.max()))
        found["changed"].append(float(apart.any(1).mean()))
    return found
