"""The attack suite on any number of models, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation import comparison
from cmai_fast.evaluation.comparison import BASELINE, IMMUNISED, UNDEFENDED, Entry
from cmai_fast.evaluation.processes import joined
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.state import running, shared
from cmai_fast.evaluation.suite import AttackSpec, check_first, check_suite, curve_attack, headline_suite
from cmai_fast.evaluation.suites import suite as named_suite
from cmai_fast.evaluation.versions import versions
from cmai_fast.metrics import METRICS
from cmai_fast.models import resolve
from cmai_fast.models.loading import chosen_device
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.tasks import TASKS
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.folder import RESULTS, STATE, check_folder, report
from cmai_fast.workflows.samples import asked, searched

SCHEMA = 2


def evaluate(
    model: str,
    data: DataSource,
    threat: ThreatModel,
    *,
    against: Sequence[str] = (),
    attacks: Sequence[AttackSpec] | None = None,
    suite: str | None = None,
    also: Sequence[AttackSpec] = (),
    out: Path,
    limit: int = 500,
    steps: int = 50,
    restarts: int = 2,
    batch_size: int = 64,
    seed: int = 0,
    task: str = "vqa",
    metrics: Sequence[str] = (),
    max_new_tokens: int | None = None,
    resume: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Measures `against` and `model` on the test split; writes results.json and report.html.

    Args:
        model: a bundled model, a model or run folder, or a hub id.
        against: models to compare with. The first is the undefended one, whose adversarial images are also tried
            on the others.
        attacks: the suite; None: PGD of `steps` and `restarts`, and APGD-CE of twice the steps.
        suite: the name of a standard set (`evaluation.suites`) in place of these.
        also: attacks that join the suite after these. `adaptive` runs on models with a guard alone.
        out: a folder that is new or empty, or with `resume` that of the same command, finished or not.
        limit: maximum number of samples, drawn with `seed`.
        batch_size: samples at a time; results do not depend on it.
        metrics: names of `METRICS` to report beside the task's own.
        max_new_tokens: of an answer; None: what the model's threshold was calibrated under, else 16.
        resume: continue an interrupted run. The numbers are those of an uninterrupted run.

    Raises:
        ValueError: an unknown name, a bad setting, or `out` holds something else; `out` is then unchanged.
    """
    if threat.surface.name == "blank":
        raise ValueError(
            "the threat blank shows the model another picture, so there is no clean accuracy to compare with; "
            "use it with cmai-fast attack"
        )
    out, names = Path(out), [*against, model]
    if suite is not None and attacks is not None:
        raise ValueError(f"the suite {suite!r} and attacks are given; expected one of the two (and `also` for more)")
    if suite is not None:
        attacks = named_suite(suite, task)
    specs = [*(headline_suite(steps, restarts) if attacks is None else attacks), *also]
    for spec in specs:
        spec.check(threat)
    check_suite(specs)
    check_first(specs)
    for name in names:
        check_names(name, task=task, metrics=metrics)
        if names.count(name) > 1:
            raise ValueError(f"the model {name} is named twice; expected each once")
    settings = {
        "model": model, "against": list(against), **data_settings(data), "limit": limit,
        "eps": threat.eps, "norm": threat.norm, "threat": str(threat.surface), "suite": suite,
        "attacks": [spec.to_dict() for spec in specs], "task": task, "metrics": list(metrics),
        "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed,
        "device": str(chosen_device(device)), "dtype": dtype, "attention": attention,
    }  # fmt: skip
    with joined() as processes:
        if (finished := processes.by_first(partial(check_folder, out, settings, resume))) is not None:
            return finished
        samples = asked(data, "test", task, limit, seed)
        training = searched(data, task, specs, seed)
        how = {"device": processes.device(device), "dtype": dtype, "attention": attention}
        entries = _entries(names, max_new_tokens, how)
        stages, show = comparison.stages(entries, len(samples), threat, specs), progress and processes.first
        with shared(running(out / STATE, settings, out), processes) as state, Overall(stages, show) as overall:
            if not processes.by_first((out / RESULTS).is_file):  # interrupted before the report
                results = comparison.compare(
                    entries, samples, threat, specs, training=training, task=task, metrics=metrics,
                    batch_size=batch_size, seed=seed, state=state, progress=overall,
                )  # fmt: skip
                results["settings"] = settings | {"command": command, "curve_attack": curve_attack(specs).key}
                results |= {"schema": SCHEMA, "seed": seed, "versions": versions()}
                results["sample_ids"] = [s.id for s in samples]
                processes.by_first(partial(write_results, results, out / RESULTS))
            return processes.by_first(partial(report, out))


def _entries(names: Sequence[str], max_new_tokens: int | None, how: Mapping[str, Any]) -> list[Entry]:
    """The models, of which the last is the one that is evaluated."""
    generation = None if max_new_tokens is None else Generation(max_new_tokens)
    roles = [UNDEFENDED, *[BASELINE] * len(names)][: len(names) - 1]
    return [
        Entry(name, role, name, partial(Pipeline.load, name, generation=generation, **how))
        for name, role in zip(names, [*roles, IMMUNISED], strict=True)
    ]


def data_settings(data: DataSource) -> dict[str, Any]:
    """The data settings of a run, which must be the same when it resumes."""
    return {
        "data": data.name,
        "fields": dict(data.fields),
        "split_seed": data.split_seed,
        "split": _tested(data),
        "missing": data.missing,
        "data_fingerprint": data.fingerprint(),
    }


def _tested(data: DataSource) -> str:
    """What is measured on, in results and reports."""
    if data.split is None:
        return "test"
    return data.split if data.split_seed is None else f"test part of {data.split}"


def check_names(model: str, *, task: str, metrics: Sequence[str] = ()) -> None:
    """Raises ValueError for an unknown name, before anything is loaded."""
    resolve(model)
    TASKS.check(task)
    for metric in metrics:
        METRICS.check(metric)
