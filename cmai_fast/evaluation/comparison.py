"""Measures any number of models by one protocol on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cmai_fast.data import Sample
from cmai_fast.evaluation import protocol, sanity
from cmai_fast.evaluation.pictures import Shown, shown
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.state import State
from cmai_fast.evaluation.suite import AttackSpec, curve_attack
from cmai_fast.evaluation.transfer import strict_transfer
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel

UNDEFENDED, IMMUNISED, BASELINE = "undefended", "immunised", "baseline"


@dataclass(frozen=True)
class Entry:
    """A model to be measured.

    Args:
        name: its name in results.
        role: `undefended` (its adversarial images are also tried on the other models), `immunised` or `baseline`.
        path: its location.
        load: loads it; one model is in memory at a time, unless this function keeps one.
    """

    name: str
    role: str
    path: str
    load: Callable[[], Pipeline]


def compare(
    entries: Sequence[Entry],
    samples: Sequence[Sample],
    threat: ThreatModel,
    suite: Sequence[AttackSpec],
    *,
    training: Sequence[Sample] = (),
    task: str,
    metrics: Sequence[str] = (),
    batch_size: int = 64,
    seed: int = 0,
    state: State | None = None,
    progress: Overall | None = None,
) -> dict[str, Any]:
    """`models` (each with its record and sanity checks, in the order of `entries`) and `pictures` of results.json."""
    state, first = state or State.temporary(), suite[0].key if suite else None
    kept: Mapping[int, Tensor] | None = None
    broke = np.zeros(len(samples), dtype=bool)  # samples on which `kept` broke the model that it was made on
    models, pictures, pipeline = [], [], None
    for place, entry in enumerate(entries):
        del pipeline  # before the next one is loaded
        pipeline = entry.load()
        pipeline.name = entry.name
        measured = protocol.measure(
            pipeline, samples, threat, suite, curve=curve_attack(suite),
            transferred=None if kept is None else {"transfer": kept}, training=training, task=task, metrics=metrics,
            batch_size=batch_size, seed=seed, state=state.part(str(place)), progress=progress,
        )  # fmt: skip
        record = measured.record
        if kept is not None:
            moved = measured.attacked["transfer"]
            record["attacks"]["transfer"]["strict"] = strict_transfer(
                broke, measured.clean.right, moved.over(len(broke), moved.right)
            )
        record["sanity"] = sanity.sanity_checks(measured, threat, must_break=entry.role == UNDEFENDED)
        models.append({"name": entry.name, "role": entry.role, "path": entry.path, **record})
        if first is not None:
            pictures += shown(entry.name, measured, first, threat)
            if entry.role == UNDEFENDED:
                kept, source = measured.attacked[first].images, measured.attacked[first]
                broke = ~source.over(len(samples), source.right)
        del measured
    _ask(entries, pictures, samples, pipeline)
    return {"models": models, "pictures": [p.record for p in pictures]}


def _ask(entries: Sequence[Entry], pictures: Sequence[Shown], samples: Sequence[Sample], last: Pipeline | None) -> None:
    """Adds every model's answers to every picture. The last model is still loaded."""
    for entry in reversed(entries):
        pipeline, last = last or entry.load(), None
        pipeline.choose_from(samples)
        for picture in pictures:
            picture.ask(entry.name, pipeline)
        del pipeline
    for picture in pictures:
        answers = picture.record["answers"]
        picture.record["answers"] = {entry.name: answers[entry.name] for entry in entries}


def stages(entries: Sequence[Entry], count: int, threat: ThreatModel, suite: Sequence[AttackSpec]) -> dict[str, float]:
    """The stages of `compare`, as those of `protocol.stages`."""
    found: dict[str, float] = {}
    undefended = False
    for entry in entries:
        found |= protocol.stages(entry.name, count, threat, suite, curve_attack(suite), undefended and bool(suite))
        found |= sanity.stages(entry.name, count, threat)
        undefended = undefended or entry.role == UNDEFENDED
    return found
