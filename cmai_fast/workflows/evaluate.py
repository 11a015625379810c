"""The attack suite on any number of models, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.protocol import AttackSpec
from cmai_fast.threat import ThreatModel


def evaluate(
    model: str,
    data: DataSource,
    threat: ThreatModel,
    *,
    against: Sequence[str] = (),
    attacks: Sequence[AttackSpec] | None = None,
    out: Path,
    limit: int = 500,
    steps: int = 50,
    restarts: int = 2,
    batch_size: int = 64,
    seed: int = 0,
    task: str = "vqa",
    metrics: Sequence[str] = (),
    max_new_tokens: int = 16,
    resume: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Measures `against` and `model` on the test split; writes results.json and report.html."""
    raise NotImplementedError
