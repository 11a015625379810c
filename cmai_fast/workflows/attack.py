"""One attack on one model: totals, a verdict per sample and, on request, the attacked images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmai_fast.attacks import ATTACKS
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation import protocol
from cmai_fast.evaluation.answers import Attacked
from cmai_fast.evaluation.export import check_export, export_set
from cmai_fast.evaluation.goals import reaches
from cmai_fast.evaluation.processes import joined
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.protocol import Measured
from cmai_fast.evaluation.results import STANDARD_OUTPUT, put_results
from cmai_fast.evaluation.saved import MANIFEST, changed_text, write_set
from cmai_fast.evaluation.state import State, check_resumable, check_settings, running, shared
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_folder
from cmai_fast.models.loading import chosen_device
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.evaluate import check_names, data_settings
from cmai_fast.workflows.folder import check_empty
from cmai_fast.workflows.samples import asked, searched

# What a record of one attack takes from that of its suite.
_OWN = (
    "attacked", "broken", "reached", "asr_target", "seconds", "nonfinite_gradients", "zero_gradients",
)  # fmt: skip


def attack(
    model: str,
    data: DataSource,
    attack: str,
    threat: ThreatModel,
    *,
    steps: int | None = None,
    restarts: int = 1,
    settings: Mapping[str, Any] | None = None,
    target: str | None = None,
    task: str = "vqa",
    metrics: Sequence[str] = (),
    limit: int = 500,
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    out: Path,
    save_images: Path | None = None,
    export: Sequence[str] = (),
    resume: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """One attack on the test split; writes one JSON file with totals and a verdict per sample.

    Args:
        attack, steps, restarts, settings, target: see `AttackSpec`. With a target, samples whose answer it is are not
            attacked, and the record says beside what broke how many samples give the target.
        out: the file; `Path("-")` is standard output.
        save_images: a folder, new or empty, for an adversarial set (`evaluation.saved`): the clean and the attacked
            images as 8-bit PNGs, `set.json`, and `manifest.jsonl`, one line per attacked sample, with its adversarial
            question if the attack changes questions. Samples whose clean answer is wrong are not attacked.
        export: the tools that are to read the set too, `garak` and `pyrit` (`evaluation.export`).
        resume: continue an interrupted run from its state in the folder `<out>.state`.
        others: as for `evaluate`.

    Raises:
        ValueError: an unknown name, a bad setting, or `out` or `save_images` exists already; both are then unchanged.
    """
    out, spec = Path(out), AttackSpec(attack, steps, restarts, dict(settings or {}), target)
    spec.check(threat)
    check_export(export, save_images)
    check_names(model, task=task, metrics=metrics)
    asked_for = {
        "model": model, **data_settings(data), "attack": attack, "eps": threat.eps, "norm": threat.norm,
        "threat": str(threat.surface), "steps": spec.steps, "restarts": restarts,
        "attack_settings": dict(spec.settings), "target": target,
        "task": task, "metrics": list(metrics), "limit": limit, "seed": seed, "batch_size": batch_size,
        "max_new_tokens": max_new_tokens, "device": str(chosen_device(device)), "dtype": dtype, "attention": attention,
        "save_images": save_images and str(save_images),
    }  # fmt: skip
    folder = out.with_name(f"{out.name}.state")
    with joined() as processes:
        begun = partial(_check_out, out, folder, asked_for, save_images, resume)
        if (finished := processes.by_first(begun)) is not None:
            return finished
        samples = asked(data, "test", task, limit, seed)
        training = searched(data, task, [spec], seed)
        generation = None if max_new_tokens is None else Generation(max_new_tokens)
        pipeline = Pipeline.load(
            model, device=processes.device(device), dtype=dtype, attention=attention, generation=generation
        )
        stages = protocol.stages(pipeline.name, len(samples), threat, [spec], None, False)
        claimed = nullcontext(State.temporary()) if out == STANDARD_OUTPUT else running(folder, asked_for, out)
        with shared(claimed, processes) as state, Overall(stages, progress and processes.first) as overall:
            measured = protocol.measure(
                pipeline, samples, threat, [spec], training=training, task=task, metrics=metrics, batch_size=batch_size,
                seed=seed, state=state, progress=overall,
            )  # fmt: skip
            record = _record(measured, spec, threat, asked_for | {"command": command})
            if processes.first:
                _write(record, measured, spec, threat, out, save_images, export)
    return record


def _write(
    record: dict[str, Any],
    measured: Measured,
    spec: AttackSpec,
    threat: ThreatModel,
    out: Path,
    images: Path | None,
    export: Sequence[str],
) -> None:
    if images is not None and not _saved(images):
        settings = record["settings"]
        data = {key: settings[key] for key in ("data", "split", "data_fingerprint", "limit")}
        write_folder(images, lambda staging: write_set(staging, measured, spec, threat, settings["model"], data))
    if images is not None:
        for kind in export:
            export_set(images, kind)
    put_results(record, out)


def _check_out(
    out: Path, folder: Path, settings: Mapping[str, Any], save_images: Path | None, resume: bool
) -> dict[str, Any] | None:
    """The record of a finished run; None if a run may start or resume."""
    if out == STANDARD_OUTPUT:
        if resume:
            raise ValueError("standard output cannot be resumed; name a file with --out, or leave --resume out")
    elif out.exists():
        if not resume:
            raise ValueError(f"{out} exists; name another file with --out, or delete it")
        if not check_resumable(folder, settings, resume, out):
            record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            check_settings(record["settings"], settings, out)
            return record
    begun = out != STANDARD_OUTPUT and check_resumable(folder, settings, resume, out)
    if save_images is not None and not begun:
        check_empty(Path(save_images), "--save-images")
    return None


def _record(measured: Measured, spec: AttackSpec, threat: ThreatModel, settings: dict[str, Any]) -> dict[str, Any]:
    runner, clean, attacked = measured.runner, measured.clean, measured.attacked[spec.key]
    places = {row: k for k, row in enumerate(attacked.rows)}
    prompts = None if attacked.prompts is None else dict(zip(attacked.rows, attacked.prompts, strict=True))
    right, right_8bit = (attacked.over(len(clean.right), values) for values in (attacked.right, attacked.right_8bit))
    per_sample = []
    for row, sample in enumerate(runner.samples):
        k = places.get(row)
        adversarial = None if k is None else attacked.predictions[k]
        found: dict[str, Any] = {} if spec.target is None else {"reached": reaches(spec, adversarial or "")}
        per_sample.append(
            {
                "sample_id": sample.id,
                "question": sample.prompt,
                "answer": sample.answer,
                "attacked": k is not None,
                "right_clean": bool(clean.right[row]),
                "right_adv": bool(clean.right[row] and right[row]),
                "right_adv_8bit": bool(clean.right[row] and right_8bit[row]),
                "prediction_clean": clean.predictions[row],
                "prediction_adv": adversarial,
                "prediction_adv_8bit": None if k is None else attacked.predictions_8bit[k],
                "forward": 0 if k is None else int(attacked.forwards[k]),
                "backward": 0 if k is None else int(attacked.backwards[k]),
            }
            | found
            | ({} if prompts is None else {f"{changed_text(attacked)}_adv": prompts.get(row)})
            | {name: None if k is None else values[k] for name, values in attacked.details.items()}
        )
    own = measured.record["attacks"][spec.key]
    found_on = {} if ATTACKS[spec.name].fit is None else {"found_on": runner.universal.record(spec, threat)}
    return {
        **{k: v for k, v in measured.record.items() if k not in ("attacks", "s_c", "detection")},
        **{k: own[k] for k in _OWN if k in own},
        **({"details": _means(attacked)} if attacked.details else {}),
        "passes": vars(attacked.passes),
        **found_on,
        "settings": settings,
        "seed": runner.seed,
        "versions": versions(),
        "per_sample": per_sample,
    }


def _means(attacked: Attacked) -> dict[str, float]:
    """The means over samples of the numbers among what an attack says of them."""
    numbers = {k: v for k, v in attacked.details.items() if all(isinstance(x, float) for x in v)}
    return {name: float(np.mean(values)) for name, values in numbers.items()}


def _saved(folder: Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()
