"""One attack on one model: totals, a verdict per sample, and the attacked images if they are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmai_fast.data.sources import DataSource
from cmai_fast.threat import ThreatModel


def attack(
    model: str,
    data: DataSource,
    attack: str,
    threat: ThreatModel,
    *,
    steps: int | None = None,
    restarts: int = 1,
    settings: Mapping[str, Any] | None = None,
    task: str = "vqa",
    metrics: Sequence[str] = (),
    limit: int = 500,
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    out: Path,
    save_images: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """One attack on the test split; writes one JSON file with totals and a verdict per sample."""
    raise NotImplementedError
