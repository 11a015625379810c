"""What universal attacks add to every image, found on samples of the training split, once per run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from cmai_fast.attacks import ATTACKS, Passes, Victim
from cmai_fast.data import Sample
from cmai_fast.evaluation.goals import aim, check_target, goal, texts_of
from cmai_fast.evaluation.state import State
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.surface import victim_of
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import Surface, ThreatModel


class Universal:
    """Finds perturbations on `training`, and keeps them in the run's state.

    Args:
        training: samples that are not measured.
        samples: those that are measured, whose texts a dual encoder chooses from.
        surface, state, seed: as of `Runner`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        training: Sequence[Sample],
        samples: Sequence[Sample],
        surface: Surface,
        state: State,
        seed: int,
    ) -> None:
        self.pipeline, self.training, self.samples = pipeline, training, samples
        self.surface, self.state, self.seed = surface, state, seed
        self._found: dict[str, Tensor] = {}

    def find(self, spec: AttackSpec, threat: ThreatModel) -> Tensor:
        """(C, H, W): `Victim.common` of this attack in this ball. The first process searches, for all of them.

        Raises:
            ValueError: there are no training samples, or none that the target would be wrong for.
        """
        stage = _stage(spec, threat)
        if stage not in self._found:
            self._found[stage] = self.state.processes.by_first(lambda: self._searched(stage, spec, threat))
        return self._found[stage]

    def record(self, spec: AttackSpec, threat: ThreatModel) -> dict[str, Any]:
        """How many samples the perturbation was found on, in which time, with how many passes."""
        (entry,) = self.state.journal(_stage(spec, threat)).entries
        return {key: entry[key] for key in ("samples", "seconds", "passes")}

    def _searched(self, stage: str, spec: AttackSpec, threat: ThreatModel) -> Tensor:
        journal = self.state.journal(stage)
        if journal.entries:
            return journal[0]
        if not self.training:
            raise ValueError(
                f"{spec.name} finds one perturbation on other samples than it is measured on, and there are none; give "
                "`training` (a data set with a training split)"
            )
        attack = ATTACKS[spec.name]
        own = {**attack.settings, **spec.settings}
        count, size, start = own.pop("samples"), own.pop("batch"), time.perf_counter()
        before = self.pipeline.collate
        try:
            self.pipeline.choose_from([*self.training, *self.samples])
            goals = self._goals(spec, self.training[:count])
            batches = [self._victims(spec, goals[k : k + size]) for k in range(0, len(goals), size)]
            assert attack.fit is not None
            found = attack.fit(batches, threat, steps=spec.steps, seed=self.seed, **own)
        finally:
            self.pipeline.collate = before
        passes = sum((victim.passes for victims in batches for victim in victims), Passes())
        entry = {"rows": [0], "samples": len(goals), "seconds": time.perf_counter() - start, "passes": vars(passes)}
        journal.append(entry, {0: found})
        return found.cpu()

    def _goals(self, spec: AttackSpec, samples: Sequence[Sample]) -> list[Sample]:
        texts = texts_of(self.pipeline)
        check_target(spec, texts)
        goals = [found for sample in samples if (found := goal(spec, sample, None, texts)) is not None]
        if not goals:
            raise ValueError(
                f"the target {spec.target!r} is right for every one of {len(samples)} training samples; name another"
            )
        return goals

    def _victims(self, spec: AttackSpec, goals: Sequence[Sample]) -> list[Victim]:
        """The batch once for each target. Their images are the same, and are read through the first alone."""
        found: list[Victim] = []
        for target in spec.targets or (None,):
            wanted = goals if target is None else [replace(g, references=(target,)) for g in goals]
            batch, one = self.pipeline.collate(wanted), replace(spec, target=target)
            victim = victim_of(self.pipeline, batch, wanted, self.surface)
            victim.exact = False
            aim(victim, one, self.pipeline, goals, [None] * len(goals))
            found.append(victim)
        return found


def _stage(spec: AttackSpec, threat: ThreatModel) -> str:
    return f"{spec.key}, found in {threat.norm} {threat.eps}"
