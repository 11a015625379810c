"""The complete immunisation: train, calibrate, evaluate before and after, write results and report."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import Sample
from cmai_fast.evaluation import comparison
from cmai_fast.evaluation.comparison import IMMUNISED, UNDEFENDED, Entry
from cmai_fast.evaluation.overhead import step_overhead
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.state import State, running
from cmai_fast.evaluation.suite import AttackSpec, curve_attack, headline_suite
from cmai_fast.evaluation.versions import versions
from cmai_fast.mbat.adapters import has_adapters
from cmai_fast.pipeline import Pipeline
from cmai_fast.tasks import TASKS
from cmai_fast.workflows import training
from cmai_fast.workflows.calibrate import HEADS, VERIFIER
from cmai_fast.workflows.evaluate import SCHEMA, data_settings
from cmai_fast.workflows.folder import RESULTS, STATE, check_folder, report
from cmai_fast.workflows.samples import asked, training_batches, training_samples
from cmai_fast.workflows.settings import ImmunizeSettings

__all__ = ["ImmunizeSettings", "immunize"]

_OVERHEAD = "cost of a step"


def immunize(settings: ImmunizeSettings, out: Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains, calibrates, evaluates the model before and after; writes `out/{model,cmcv,results.json,report.html}`.

    Args:
        settings: see `ImmunizeSettings`.
        out: a folder that is new or empty, or with `resume` that of a run with the same settings, finished or not.
        resume: continue an interrupted run. Weights and numbers are those of an uninterrupted run.

    Raises:
        ValueError: unknown model or data, settings out of range, or `out` holds other files; it is then unchanged.
    """
    out = Path(out)
    TASKS.check(settings.task)
    settings = training.resolved(settings)
    began_with = asdict(settings) | data_settings(settings.source)
    if (finished := check_folder(out, began_with, resume)) is not None:
        return finished
    # Everything that can be checked is checked before the folder is created and hours are spent.
    args = training.training_arguments(settings, out)
    suite = headline_suite(settings.attack_steps, settings.restarts)
    samples = asked(settings.source, "test", settings.task, settings.limit, settings.seed)
    settings.source.check("train", "calibration", answers=True)
    before = training.load(settings, settings.model)
    if has_adapters(before.model):
        raise ValueError(
            f"{settings.model} holds adapters, which come frozen, and immunize writes a whole model; save "
            "merge_and_unload() of the PeftModel and name that folder, or train the adapters by MBATTrainer"
        )
    if before.chooses and args.consistency_steps:
        raise ValueError(
            f"consistency_steps is {args.consistency_steps}, and {settings.model} is a dual encoder, whose S_c is not "
            "that of a verifier; expected 0"
        )
    entries = [
        Entry("undefended", UNDEFENDED, settings.model, lambda: before),
        Entry("immunised", IMMUNISED, str(out / "model"), partial(training.load, settings, str(out / "model"))),
    ]
    stages = _training_stages(settings, before) | comparison.stages(entries, len(samples), args.threat, suite)
    stages[_OVERHEAD] = 150.0 * settings.batch_size
    with running(out / STATE, began_with, out) as state, Overall(stages, progress) as overall:
        if not (out / RESULTS).is_file():  # interrupted before the report
            results = _immunised(settings, out, before, entries, samples, suite, state, overall)
            results["settings"] = began_with | {
                "steps": settings.attack_steps, "curve_attack": curve_attack(suite).key,
            }  # fmt: skip
            write_results(results, out / RESULTS)
        return report(out)


def _immunised(
    settings: ImmunizeSettings,
    out: Path,
    before: Pipeline,
    entries: list[Entry],
    samples: list[Sample],
    suite: list[AttackSpec],
    state: State,
    overall: Overall,
) -> dict[str, Any]:
    """The results, without settings; finished stages are not repeated."""
    checkpoints, trained = state.folder / "checkpoints", state.folder / "trained.json"
    args = training.training_arguments(settings, checkpoints)
    heads = training.fitted(before, settings, overall)
    if not trained.is_file():
        record = training.train(before, heads, settings, out, True, overall, checkpoints)
        write_results(record, trained)
    results = comparison.compare(
        entries, samples, args.threat, suite, task=settings.task, seed=settings.seed, state=state, progress=overall
    )
    overall.start(_OVERHEAD, 1)
    data = training_samples(settings.source, settings.task, before)
    statements = heads.statements if isinstance(heads, Verifier) else None
    batch = next(training_batches(before, data, settings.batch_size, settings.seed, statements))
    return {
        "schema": SCHEMA,
        **results,
        "overhead": step_overhead(before, args, batch, heads=heads),
        "training": json.loads(trained.read_text(encoding="utf-8")),
        "seed": settings.seed,
        "versions": versions(),
        "sample_ids": [s.id for s in samples],
    }


def _training_stages(settings: ImmunizeSettings, before: Pipeline) -> dict[str, float]:
    """Stages up to the first attack, with the approximate number of forward passes per sample of each."""
    stage = HEADS if before.chooses else VERIFIER
    found = {stage: 3.0 * training.HEAD_STEPS * settings.batch_size} if training.must_fit(before, settings) else {}
    assert settings.inner_steps is not None and settings.consistency_steps is not None  # resolved
    full, alone = 9 + settings.inner_steps * (3 if settings.inner == "pgd" else 1), settings.consistency_steps
    a_step = (full + 6 * alone) / (1 + alone)
    found[training.TRAINING] = a_step * settings.max_steps * settings.batch_size
    return found | {training.CALIBRATION: 6.0 * settings.calibration_samples}
