"""The whole job, end to end: train, calibrate, evaluate before and after, and write what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmai_fast.workflows.settings import ImmunizeSettings

__all__ = ["ImmunizeSettings", "immunize"]


def immunize(settings: ImmunizeSettings, out: Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains, calibrates, evaluates the model before and after; writes `out/{model,cmcv,results.json,report.html}`."""
    raise NotImplementedError
