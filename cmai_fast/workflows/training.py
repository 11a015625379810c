"""The training of an immunisation: consistency heads if the model has none, and the model itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.fit import fit_threshold
from cmai_fast.cmcv.statements import Statements
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import Sample
from cmai_fast.defences import DEFENCES
from cmai_fast.evaluation.progress import Overall, Silent, TrainingProgress
from cmai_fast.evaluation.protocol import own_scores
from cmai_fast.files import write_folder
from cmai_fast.mbat import MBATConfig, MBATTrainer, last_checkpoint
from cmai_fast.models.loading import chosen_device, is_dual_encoder
from cmai_fast.pipeline import Generation, Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.calibrate import OWN, new_heads, new_verifier
from cmai_fast.workflows.samples import asked, training_collator, training_samples
from cmai_fast.workflows.settings import OF_DEFENCE, ImmunizeSettings

HEAD_STEPS = 300  # batches that heads learn before MBAT uses their S_c; a verifier half as many
TRAINING, CALIBRATION = "training", "calibration"
# Settings whose names are those of MBATConfig.
_SAME = (
    "eps norm inner inner_steps refreshes alpha beta consistency_steps anchor lam gamma arm trainable eps_warmup "
    "max_steps seed save_steps learning_rate muon recompute"
).split()
# The same, and without effect where ARM is off.
_OF_ARM = "tau_train variance_max beta_max beta_step eps_max eps_step lam_max lam_step".split()


def load(settings: ImmunizeSettings, name: str) -> Pipeline:
    generation = None if settings.max_new_tokens is None else Generation(settings.max_new_tokens)
    return Pipeline.load(
        name, device=settings.device, dtype=settings.dtype, attention=settings.attention, generation=generation
    )


def resolved(settings: ImmunizeSettings) -> ImmunizeSettings:
    """The same, with a defence and a value for each field that is the defence's.

    Raises:
        ValueError: unknown model or defence.
    """
    name = settings.defence
    if name is None:
        name = "mbat" if is_dual_encoder(settings.model) else "cmai"
    of_mbat = {f.name: f.default for f in fields(MBATConfig)}
    defaults = {f.name: f.default for f in fields(settings) if f.default is not MISSING}
    own = {**of_mbat, **DEFENCES[name].values}
    names = [*OF_DEFENCE, *(n for n in DEFENCES[name].values if n in defaults and n not in OF_DEFENCE)]
    return replace(settings, defence=name, **{n: own[n] for n in names if getattr(settings, n) == defaults[n]})


def training_arguments(settings: ImmunizeSettings, out: Path) -> MBATConfig:
    """The trainer's arguments for these settings, writing to `out`.

    Raises:
        ValueError: settings out of range, or that exclude each other.
    """
    device = chosen_device(settings.device)
    if device.index is not None:
        raise ValueError(
            f"device is {settings.device!r}; training takes all devices that it sees: give cuda, and choose with "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    if settings.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs is True, and the device is {device}; set it to False, or leave it out")
    settings = resolved(settings)
    assert settings.defence is not None
    _check_arm(settings)
    values = {**DEFENCES[settings.defence].values, **{name: getattr(settings, name) for name in (*_SAME, *_OF_ARM)}}
    fixed = {
        "output_dir": str(out),
        "use_cpu": device.type == "cpu",
        "per_device_train_batch_size": settings.batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.max_steps // 20),
        "weight_decay": 0.0,
        "save_total_limit": 2,
        "logging_steps": max(1, min(10, settings.max_steps // 20)),
        "report_to": "none",
        "disable_tqdm": True,  # TrainingProgress shows it
        "dataloader_pin_memory": False,
        "dataloader_drop_last": True,
        "cuda_graphs": bool(settings.cuda_graphs),
    }
    arguments = MBATConfig(**fixed | values)
    if settings.cuda_graphs is None:
        arguments.cuda_graphs = arguments.can_capture
    return arguments


def _check_arm(settings: ImmunizeSettings) -> None:
    defaults = {f.name: f.default for f in fields(settings)}
    for name in _OF_ARM:
        if settings.arm is False and (value := getattr(settings, name)) != defaults[name]:
            raise ValueError(
                f"{name} is {value}, which ARM alone reads, and arm is False (that of defence {settings.defence!r}, if "
                "you did not set it); set arm to True (--arm), or leave it out"
            )


def train(
    before: Pipeline,
    heads: Verifier | ConsistencyHeads | None,
    settings: ImmunizeSettings,
    out: Path,
    resume: bool,
    progress: Overall | None = None,
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """Trains a copy of the model; writes out/model and out/cmcv atomically; returns the training curves.

    Args:
        before: the model; it is not changed.
        heads: what S_c is measured with, from `fitted`; it is not changed.
        resume: resume from the last complete checkpoint, if there is one.
        checkpoints: their folder; None: `out`.
    """
    progress, checkpoints = progress or Silent(), checkpoints or out
    subject = load(settings, settings.model)
    args = training_arguments(settings, checkpoints)
    heads = copy.deepcopy(heads) if needs_consistency(args) else None
    statements = heads.statements if isinstance(heads, Verifier) else None
    trainer = MBATTrainer(
        subject.model,
        args,
        heads=heads,
        train_dataset=training_samples(settings.source, settings.task, subject),
        data_collator=training_collator(subject, settings.seed, statements),
        processing_class=subject.processor,
    )
    checkpoint = last_checkpoint(checkpoints) if resume and checkpoints.is_dir() else None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingProgress(progress, TRAINING))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    if trainer.heads is not None:
        trainer.heads.to(subject.model.device).eval().requires_grad_(False)  # as if loaded
        learned = trainer.verifier or trainer.heads
        assert isinstance(learned, (Verifier, ConsistencyHeads))
        after = Pipeline("immunised", subject.model, subject.processor, generation=subject.generation)
        _give(after, learned)
        threshold = _threshold(after, settings, progress)
        write_folder(out / "cmcv", lambda d: learned.save_pretrained(d, threshold))
    write_folder(out / "model", lambda d: (subject.model.save_pretrained(d), subject.processor.save_pretrained(d)))
    return _curves(trainer) | {
        "objective": args.objective,
        "seconds": seconds,
        "resumed": checkpoint is not None,
        "passes": vars(trainer.passes),
    }


def _curves(trainer: MBATTrainer) -> dict[str, list[Any]]:
    logs = [entry for entry in trainer.state.log_history if "loss_clean" in entry or "loss_adv" in entry]
    curves = (
        "loss", "loss_clean", "loss_adv", "loss_contrastive", "loss_consistency", "loss_drift", "s_c_clean", "s_c_adv",
        "beta", "eps", "lam", "arm_level", "arm_mean", "arm_variance", "tau_train",
    )  # fmt: skip
    return {
        "step": [entry["step"] for entry in logs],
        **{k: [entry.get(k) for entry in logs] for k in curves if any(k in entry for entry in logs)},
    }


def calibration_scores(pipeline: Pipeline, samples: Sequence[Sample], progress: Overall | None = None) -> Tensor:
    """S_c (n,) of clean samples with the model's own answers, on which a threshold is set."""
    if progress is not None:
        progress.start(CALIBRATION, len(samples))
    return torch.from_numpy(own_scores(pipeline, samples, 128, progress=progress))


def fitted(
    before: Pipeline, settings: ImmunizeSettings, progress: Overall | None = None
) -> Verifier | ConsistencyHeads | None:
    """What MBAT measures S_c with: the model's own if it has a verifier of its own features (a dual encoder: heads),
    else a new one, fitted to its clean features. None: the settings need none, and the model has a score.

    A model without any score gets this one, with a threshold, so that its detector can be compared.
    """
    progress = progress or Silent()
    fits = must_fit(before, settings)
    if not fits and not needs_consistency(settings):
        return None
    samples = training_samples(settings.source, settings.task, before)
    if not fits:
        if before.chooses:
            assert before.heads is not None
            return before.heads
        assert before.verifier is not None
        before.verifier.statements = Statements(samples, before.verifier.alternatives, seed=settings.seed)
        return before.verifier
    found: Verifier | ConsistencyHeads
    if before.chooses:
        found = new_heads(before, samples, HEAD_STEPS, settings.batch_size, settings.seed, progress)
    else:
        ball = ThreatModel(settings.norm, settings.eps)  # type: ignore[arg-type]  # checked by MBATConfig
        found = new_verifier(
            before, samples, HEAD_STEPS // 6, OWN, ball, settings.batch_size, settings.seed, progress, inner_steps=0
        )
    if not before.scores:
        _give(before, found)
        before.threshold = _threshold(before, settings, progress)
    return found


def needs_consistency(settings: ImmunizeSettings | MBATConfig) -> bool:
    """Whether training measures S_c."""
    if isinstance(settings, ImmunizeSettings):
        settings = resolved(settings)
    return any((settings.beta, settings.gamma, settings.arm, settings.consistency_steps))


def must_fit(before: Pipeline, settings: ImmunizeSettings) -> bool:
    """Whether the model comes without what is needed: a score, or what MBAT measures S_c with."""
    if before.scores and not needs_consistency(settings):
        return False
    if before.chooses:
        return before.heads is None
    return before.verifier is None or before.verifier.tower is not None


def _give(pipeline: Pipeline, found: Verifier | ConsistencyHeads) -> None:
    if isinstance(found, Verifier):
        pipeline.verifier = found.of(pipeline.bridge)
    else:
        pipeline.heads = found


def _threshold(pipeline: Pipeline, settings: ImmunizeSettings, progress: Overall) -> Any:
    samples = asked(settings.source, "calibration", settings.task, settings.calibration_samples, settings.seed)
    pipeline.choose_from(samples)
    scores = calibration_scores(pipeline, samples, progress)
    return fit_threshold(scores, "calibration", generation=pipeline.generation, fingerprint=pipeline.fingerprint())
