"""Shares of transferred adversarial samples, counted over the samples that the target model answers right."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmai_fast.metrics import bootstrap_interval


def share(broken: np.ndarray) -> dict[str, Any]:
    """`attacked`, `broken`, `asr` and its 95% interval of `broken` (n,) bool; None where nothing was attacked."""
    found = len(broken) > 0
    return {
        "attacked": len(broken),
        "broken": int(broken.sum()),
        "asr": float(broken.mean()) if found else None,
        "asr_interval": list(bootstrap_interval(broken)) if found else None,
    }


def strict_transfer(broke: np.ndarray, right_clean: np.ndarray, right_adv: np.ndarray) -> dict[str, Any]:
    """`share` over the samples that broke the source (`broke`) and that the target answers right without an attack; all
    are (n,) bool."""
    return share(~right_adv[broke & right_clean])
