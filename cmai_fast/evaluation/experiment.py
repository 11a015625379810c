"""The whole job, end to end: train, calibrate, evaluate before and after, and write what was found."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PrinterCallback

from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.fit import fit_heads, fit_threshold
from cmai_fast.data import Sample, VQACollator, load_dataset
from cmai_fast.evaluation.overhead import step_overhead
from cmai_fast.evaluation.pictures import picture_grid
from cmai_fast.evaluation.progress import TrainingBar
from cmai_fast.evaluation.protocol import AttackSpec, Measured, batches, clean_verdicts, measure, own_scores, run_attack
from cmai_fast.evaluation.results import read_results, write_results
from cmai_fast.evaluation.sanity import sanity_checks
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_folder
from cmai_fast.mbat import MBATConfig, MBATTrainer, last_checkpoint
from cmai_fast.mbat.adapters import has_adapters
from cmai_fast.metrics import accuracy, attack_success_rate, worst_case
from cmai_fast.models.loading import chosen_device
from cmai_fast.pipeline import Pipeline
from cmai_fast.report import write_report
from cmai_fast.threat import ThreatModel

RUN_FILE = "run.json"
HEAD_STEPS = 300


@dataclass
class ImmunizeSettings:
    """One immunisation. `eps` in the [0, 1] pixel range; `max_steps` are optimiser steps of `batch_size` samples."""

    model: str = "easyvqa-llava"
    data: str = "easyvqa"
    eps: float = 8 / 255
    norm: str = "linf"
    inner: str = "bridge"
    inner_steps: int = 10
    refreshes: int = 0
    alpha: float = 1.0
    beta: float = 0.1
    lam: float = 0.5
    gamma: float = 0.1
    arm: bool = True
    trainable: str = "all"
    max_steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 5e-4
    muon: bool = False
    eps_warmup: float = 0.2
    seed: int = 0
    attack_steps: int = 50
    restarts: int = 2
    limit: int = 500
    save_steps: int = 100
    calibration_samples: int = 1000
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            least = 0 if name in ("refreshes", "seed") else 1
            if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected above 0, finite")

    def load(self, name: str) -> Pipeline:
        return Pipeline.load(name, device=self.device, dtype=self.dtype, attention=self.attention)


def immunize(settings: ImmunizeSettings, out: Path, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains, calibrates, evaluates the model before and after; writes `out/{model,cmcv,results.json,report.html}`.

    Args:
        settings: see there.
        out: a folder that is new or empty, or with `resume` that of an interrupted run with the same settings.
        resume: go on from the last whole checkpoint; the result is that of a run never interrupted.

    Raises:
        ValueError: unknown model or data, settings out of range, or `out` holds something else; `out` is untouched.
    """
    out = Path(out)
    _check_out(out, settings, resume)
    if (out / "results.json").is_file():  # interrupted before the report
        return _finish(out, dict(read_results(out)))
    # All that can be refused is refused before the folder is claimed and hours are spent.
    args = training_arguments(settings, out)
    samples = _samples(settings.data, "test", settings.limit, settings.seed)
    suite = [AttackSpec("pgd", settings.attack_steps, settings.restarts), AttackSpec("apgd", 2 * settings.attack_steps)]
    before = settings.load(settings.model)
    if has_adapters(before.model):
        raise ValueError(
            f"{settings.model} holds adapters, which come frozen, and immunize writes a whole model; save "
            "merge_and_unload() of the PeftModel and name that folder, or train the adapters by MBATTrainer"
        )
    if not (out / RUN_FILE).is_file():
        write_results(asdict(settings), out / RUN_FILE)
    if before.heads is None:
        add_heads(before, settings, progress)
    trained = out / "trained.json"
    if not trained.is_file():
        record = train(before, settings, out, resume, progress)
        write_results(record, trained)
    after = settings.load(str(out / "model"))
    after.name = "immunised"
    results = _compare(before, after, samples, args.threat, suite, settings.seed, progress)
    data = load_dataset(settings.data, "train", settings.batch_size, settings.seed)
    batch = VQACollator(before.processor, negatives=1)([data[i] for i in range(len(data))])
    results["overhead"] = step_overhead(before, args, batch)
    results["training"] = json.loads(trained.read_text())
    results["settings"] = asdict(settings) | {"split": "test", "steps": settings.attack_steps} | _curve_setting(suite)
    results |= {"seed": settings.seed, "versions": versions(), "sample_ids": [s.id for s in samples]}
    write_results(results, out / "results.json")
    return _finish(out, results)


def _finish(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    write_report(read_results(out), out / "report.html")
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # only needed to resume
    return results


def evaluate(
    model: str,
    data: str,
    threat: ThreatModel,
    *,
    against: str | None,
    out: Path,
    limit: int = 500,
    steps: int = 50,
    restarts: int = 2,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Measures `model`, and `against` if named, on the test split; writes results.json and report.html.

    Raises:
        ValueError: unknown model or data, or `out` holds anything already.
    """
    out = Path(out)
    _check_empty(out)
    samples = _samples(data, "test", limit, seed)
    suite = [AttackSpec("pgd", steps, restarts), AttackSpec("apgd", 2 * steps)]
    how = {"device": device, "dtype": dtype, "attention": attention}
    after, before = Pipeline.load(model, **how), Pipeline.load(against, **how) if against else None
    results = _compare(before, after, samples, threat, suite, seed, progress, batch_size)
    results["settings"] = {
        "model": model, "against": against, "data": data, "split": "test", "limit": limit, "eps": threat.eps,
        "norm": threat.norm, "steps": steps, "restarts": restarts, "batch_size": batch_size, **how,
        "device": str(after.model.device), "command": command,
    } | _curve_setting(suite)  # fmt: skip
    results |= {"seed": seed, "versions": versions(), "sample_ids": [s.id for s in samples]}
    out.mkdir(parents=True, exist_ok=True)
    write_results(results, out / "results.json")
    write_report(read_results(out / "results.json"), out / "report.html")
    return results


def attack(
    model: str,
    data: str,
    attack_name: str,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    limit: int,
    seed: int,
    batch_size: int,
    out: Path,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    progress: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """One attack on the test split; writes one JSON file with totals and a verdict per sample."""
    spec = AttackSpec(attack_name, steps, restarts)
    if Path(out).exists():
        raise ValueError(f"{out} exists; name another file with --out, or delete it")
    samples = _samples(data, "test", limit, seed)
    how = {"device": device, "dtype": dtype, "attention": attention}
    subject = Pipeline.load(model, **how)
    _, clean = clean_verdicts(subject, samples, batch_size, progress)
    attacked = run_attack(subject, samples, spec, threat, batch_size=batch_size, seed=seed, progress=progress)
    right, right_8bit = worst_case(clean, attacked.right), worst_case(clean, attacked.right_8bit)
    record: dict[str, Any] = {
        "acc_clean": accuracy(clean),
        "acc_robust": accuracy(right),
        "acc_robust_8bit": accuracy(right_8bit),
        "asr": attack_success_rate(clean, right),
        "n": len(samples),
        "passes": vars(attacked.passes),
        "seconds": attacked.seconds,
        "settings": {
            "model": model, "data": data, "split": "test", "attack": attack_name, "eps": threat.eps,
            "norm": threat.norm, "steps": steps, "restarts": restarts, "limit": limit, "batch_size": batch_size,
            **how, "device": str(subject.model.device), "command": command,
        },
        "precision": str(subject.model.dtype),
        "seed": seed,
        "versions": versions(),
        "per_sample": [
            {
                "sample_id": s.id, "question": s.prompt, "answer": s.answer,
                "right_clean": bool(c), "right_adv": bool(r),
            }
            for s, c, r in zip(samples, clean, right, strict=True)
        ],
    }  # fmt: skip
    write_results(record, Path(out))
    return record


def _compare(
    before: Pipeline | None,
    after: Pipeline,
    samples: list[Sample],
    threat: ThreatModel,
    suite: list[AttackSpec],
    seed: int,
    progress: bool,
    batch_size: int = 64,
) -> dict[str, Any]:
    """`undefended`, `immunised` and `pictures`; images made on the undefended model are also tried on the other."""
    curve, first = _curve_attack(suite), suite[0].key
    subjects = {k: s for k, s in (("undefended", before), ("immunised", after)) if s is not None}
    measured: dict[str, Measured] = {}
    results: dict[str, Any] = {"undefended": None, "immunised": None}
    for key, subject in subjects.items():
        transferred = (
            {"transfer": measured["undefended"].attacked[first].adv} if key != "undefended" and measured else None
        )
        measured[key] = measure(
            subject, samples, threat, suite, curve=curve, transferred=transferred, batch_size=batch_size, seed=seed,
            progress=progress,
        )  # fmt: skip
        measured[key].record["sanity"] = sanity_checks(
            subject, samples, measured[key], threat, must_break=key == "undefended", batch_size=batch_size, seed=seed,
            progress=progress,
        )  # fmt: skip
        results[key] = measured[key].record
    results["pictures"] = picture_grid(subjects, measured, samples, first, threat)
    return results


def _curve_attack(suite: list[AttackSpec]) -> AttackSpec:
    """Fewer steps than the headline: the curve has many points, and says what it was made with."""
    return AttackSpec("pgd", min(20, suite[0].steps))


def _curve_setting(suite: list[AttackSpec]) -> dict[str, str]:
    return {"curve_attack": _curve_attack(suite).key}


def _samples(data: str, split: str, limit: int, seed: int) -> list[Sample]:
    dataset = load_dataset(data, split, limit, seed)
    return [dataset[i] for i in range(len(dataset))]


def _check_out(out: Path, settings: ImmunizeSettings, resume: bool) -> None:
    """Refuses a folder that this run may not write to; changes nothing."""
    if not (out / RUN_FILE).is_file():
        _check_empty(out)
        return
    try:
        began = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
        mine = asdict(settings) | {"command": began["command"]}
        changed = [f"{k} was {began[k]!r}, now {v!r}" for k, v in mine.items() if began[k] != v]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out / RUN_FILE} was not written by this version of cmai-fast; name a new folder") from None
    if (out / "results.json").exists() and (out / "report.html").exists():
        raise ValueError(f"{out} holds a finished run; name another folder with --out, or delete it")
    if not resume:
        raise ValueError(f"{out} holds an unfinished run; continue it with --resume, or name another folder")
    if changed:
        raise ValueError(f"{out} was begun with other settings ({'; '.join(changed)}); resume with the same ones")


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new folder with --out")


def training_arguments(settings: ImmunizeSettings, out: Path) -> MBATConfig:
    """The trainer's arguments for these settings, writing to `out`."""
    device = chosen_device(settings.device)
    if device.index is not None:
        raise ValueError(
            f"device is {settings.device!r}; training takes all devices that it sees: give cuda, and choose with "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    same = (
        "eps norm inner inner_steps refreshes alpha beta lam gamma arm trainable eps_warmup max_steps seed save_steps"
    )
    return MBATConfig(
        **{name: getattr(settings, name) for name in (*same.split(), "learning_rate", "muon")},
        output_dir=str(out),
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=settings.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.max_steps // 20),
        weight_decay=0.0,
        save_total_limit=2,
        logging_steps=max(1, min(10, settings.max_steps // 20)),
        report_to="none",
        disable_tqdm=True,  # a TrainingBar shows the progress
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    )


def train(before: Pipeline, settings: ImmunizeSettings, out: Path, resume: bool, progress: bool) -> dict[str, Any]:
    """Trains a copy of the model; writes out/model and out/cmcv whole; returns the training curves."""
    subject = settings.load(settings.model)
    args = training_arguments(settings, out)
    if before.threshold is not None:
        # What S_c means differs from heads to heads: inconsistent is what hardly any clean input scores.
        args.tau_train = before.threshold.tau
    data = load_dataset(settings.data, "train")
    needs_heads = bool(args.beta or args.gamma or args.arm)
    trainer = MBATTrainer(
        subject.model,
        args,
        heads=copy.deepcopy(before.heads) if needs_heads else None,  # `before` is still to be measured
        train_dataset=data,
        data_collator=VQACollator(
            subject.processor, negatives=1, max_length=subject.bridge.context, seed=settings.seed
        ),
        processing_class=subject.processor,
    )
    checkpoint = last_checkpoint(out) if resume else None
    start = time.perf_counter()
    bar = TrainingBar()
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.add_callback(bar)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.progress.stop()  # an interrupted training leaves the terminal as it was
    seconds = time.perf_counter() - start
    if trainer.heads is not None:
        heads = trainer.heads.to(subject.model.device).eval()
        after = Pipeline("immunised", subject.model, subject.processor, heads)
        scores = calibration_scores(after, settings.data, settings.calibration_samples, settings.seed, progress)
        threshold = fit_threshold(scores, "calibration")
        write_folder(out / "cmcv", lambda d: heads.save_pretrained(d, threshold))
    write_folder(out / "model", lambda d: (subject.model.save_pretrained(d), subject.processor.save_pretrained(d)))
    logs = [entry for entry in trainer.state.log_history if "loss_clean" in entry]
    curves = ("loss", "loss_clean", "loss_adv", "loss_contrastive", "s_c_adv", "beta")
    return {
        "step": [entry["step"] for entry in logs],
        **{k: [entry.get(k) for entry in logs] for k in curves if any(k in entry for entry in logs)},
        "seconds": seconds,
        "resumed": checkpoint is not None,
        "passes": vars(trainer.passes),
    }


def calibration_scores(subject: Pipeline, data: str, limit: int, seed: int, progress: bool) -> Tensor:
    """S_c (n,) of clean inputs of the calibration split with the model's own answers: what a threshold is set on."""
    held_out = _samples(data, "calibration", limit, seed)
    loader = batches(subject, held_out, 128, "calibration", progress)
    images = [image.cpu() for objective, clean, _ in loader for image in objective.split(clean)]
    return torch.from_numpy(own_scores(subject, held_out, images, 128))


def add_heads(subject: Pipeline, settings: ImmunizeSettings, progress: bool) -> None:
    """Heads and a threshold for a model that came without, on its own features, before MBAT uses S_c."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # a resumed run has to find the same heads
        heads = ConsistencyHeads(subject.bridge.image_dim, subject.bridge.text_dim).to(subject.model.device)
    stream = training_batches(subject, settings.data, settings.batch_size, settings.seed)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("consistency heads", total=HEAD_STEPS)
        fit_heads(subject.bridge, heads, stream, steps=HEAD_STEPS, on_step=lambda *_: bar.advance(task))
    subject.heads = heads
    scores = calibration_scores(subject, settings.data, settings.calibration_samples, settings.seed, progress)
    subject.threshold = fit_threshold(scores, "calibration")


def training_batches(subject: Pipeline, data: str, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless training batches with wrong answers, in an order that depends on `seed` alone."""
    dataset, collate = load_dataset(data, "train"), VQACollator(subject.processor, negatives=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(dataset), (batch_size,), generator=generator).tolist()
        yield {k: v.to(subject.model.device) for k, v in collate([dataset[i] for i in rows]).items()}
