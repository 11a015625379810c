"""How one model is measured: clean, under a suite of attacks, over eps, and by its own detector."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from cmai_fast.attacks import ATTACKS, AttackResult, Passes, Victim
from cmai_fast.data import Sample
from cmai_fast.metrics import (
    accuracy,
    attack_success_rate,
    auroc,
    bootstrap_interval,
    rejection_accuracy,
    roc_curve,
    tpr_at_fpr,
    worst_case,
)
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel, round_to_8bit

CURVE_EPS = (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 24 / 255)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class AttackSpec:
    """An attack of `cmai_fast.attacks.ATTACKS` with its strength."""

    name: str
    steps: int
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise ValueError(f"unknown attack {self.name!r}; known: {', '.join(ATTACKS)}")
        for what in ("steps", "restarts"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} of {self.name} is {getattr(self, what)}; expected at least 1")

    @property
    def key(self) -> str:
        return f"{self.name}-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "")


@dataclass
class Attacked:
    """What an attack did to all samples: images in [0, 1], as `Victim.split` gives them, verdicts (N,) bool, price,
    bad gradients."""

    adv: list[Tensor]
    right: np.ndarray
    right_8bit: np.ndarray
    passes: Passes
    seconds: float
    nonfinite: int = 0


@dataclass
class Measured:
    """The record that goes into results.json, and the images and verdicts it rests on."""

    record: dict[str, Any]
    clean: list[Tensor]
    clean_right: np.ndarray
    attacked: dict[str, Attacked] = field(default_factory=dict)


def objective_of(subject: Pipeline, batch: dict[str, Tensor]) -> Victim:
    """L_task on a batch of `subject.collate`, on the model's device."""
    return Victim(subject.bridge, subject.space, subject.on_device(batch))


def is_right(subject: Pipeline, pixels: Tensor, objective: Victim) -> Tensor:
    """Verdict on images in [0, 1], as `objective.pixels()` gives them: (N,) bool."""
    return objective.right(pixels)


def batches(
    subject: Pipeline, samples: Sequence[Sample], size: int, what: str, progress: bool
) -> Iterator[tuple[Victim, Tensor, Tensor]]:
    """Victims of the samples, `size` at a time, their clean images in [0, 1] and ids (n,), with a progress bar."""
    for start in track(range(0, len(samples), size), f"{subject.name}: {what}", disable=not progress, transient=False):
        batch = subject.collate(samples[start : start + size])
        objective = objective_of(subject, batch)
        yield objective, objective.pixels(), batch["sample_ids"]


def run_attack(
    subject: Pipeline,
    samples: Sequence[Sample],
    spec: AttackSpec,
    threat: ThreatModel,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Attacked:
    """One attack on all samples. Verdicts are also given for the images rounded to 8 bits inside the ball."""
    start, passes, nonfinite = time.perf_counter(), Passes(), 0
    adv: list[Tensor] = []
    right, right_8bit = [], []
    what = f"{spec.key} at {_eps_text(threat)}"
    for objective, clean, sample_ids in batches(subject, samples, batch_size, what, progress):
        result: AttackResult = ATTACKS[spec.name](
            objective, clean, threat, steps=spec.steps, restarts=spec.restarts, seed=seed, sample_ids=sample_ids
        )
        passes = passes + result.passes
        nonfinite += int(result.nonfinite.sum())
        adv += _kept(objective, result.adv)
        right.append(~result.fooled)
        right_8bit.append(is_right(subject, round_to_8bit(result.adv, clean, threat), objective))
    verdicts = torch.cat(right).cpu().numpy(), torch.cat(right_8bit).cpu().numpy()
    return Attacked(adv, *verdicts, passes, time.perf_counter() - start, nonfinite)


def _kept(objective: Victim, pixels: Tensor) -> list[Tensor]:
    """On the CPU, so that a device holds the images of one batch only."""
    return [image.cpu() for image in objective.split(pixels)]


def measure(
    subject: Pipeline,
    samples: Sequence[Sample],
    threat: ThreatModel,
    suite: Sequence[AttackSpec],
    *,
    curve: AttackSpec | None = None,
    transferred: dict[str, list[Tensor]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Measured:
    """Everything that is said of one model, as a JSON-ready record.

    Args:
        suite: Acc_robust is over the worst of these, sample by sample; the first gives the S_c of attacked inputs.
        curve: the attack for robust accuracy over eps; None leaves the curve out.
        transferred: adversarial images made elsewhere for the same samples, as in `Attacked`, by name; they join the
            suite.
    """
    clean, clean_right = clean_verdicts(subject, samples, batch_size, progress)
    measured = Measured({"acc_clean": accuracy(clean_right), "n": len(samples)}, clean, clean_right)
    for spec in suite:
        measured.attacked[spec.key] = run_attack(
            subject, samples, spec, threat, batch_size=batch_size, seed=seed, progress=progress
        )
    for name, images in (transferred or {}).items():
        measured.attacked[name] = _transferred(subject, samples, images, threat, batch_size)
    robust = worst_case(clean_right, *(a.right for a in measured.attacked.values()))
    record = measured.record
    record["precision"] = str(subject.model.dtype)
    record["acc_clean_interval"] = list(bootstrap_interval(clean_right.astype(float)))
    record["acc_robust"] = accuracy(robust)
    record["acc_robust_interval"] = list(bootstrap_interval(robust.astype(float)))
    record["acc_robust_8bit"] = accuracy(worst_case(clean_right, *(a.right_8bit for a in measured.attacked.values())))
    record["asr"] = attack_success_rate(clean_right, robust)
    specs = {s.key: s for s in suite}
    record["attacks"] = {k: _attack_record(a, clean_right, specs.get(k)) for k, a in measured.attacked.items()}
    if curve is not None:
        record["curve"] = _curve(subject, samples, curve, threat, batch_size, seed, progress)
    if subject.heads is not None:
        _add_consistency(measured, subject, samples, batch_size)
    return measured


def clean_verdicts(
    subject: Pipeline, samples: Sequence[Sample], batch_size: int, progress: bool
) -> tuple[list[Tensor], np.ndarray]:
    """Clean images in [0, 1], one a sample, and whether each is answered right."""
    images: list[Tensor] = []
    right = []
    for objective, clean, _ in batches(subject, samples, batch_size, "clean", progress):
        images += _kept(objective, clean)
        right.append(is_right(subject, clean, objective))
    return images, torch.cat(right).cpu().numpy()


def _transferred(
    subject: Pipeline, samples: Sequence[Sample], adv: list[Tensor], threat: ThreatModel, batch_size: int
) -> Attacked:
    right, right_8bit, start = [], [], time.perf_counter()
    for i, (objective, clean, _) in enumerate(batches(subject, samples, batch_size, "transferred", False)):
        part = objective.join(adv[i * batch_size : (i + 1) * batch_size])
        right.append(is_right(subject, part, objective))
        right_8bit.append(is_right(subject, round_to_8bit(part, clean, threat), objective))
    seconds = time.perf_counter() - start
    return Attacked(adv, torch.cat(right).cpu().numpy(), torch.cat(right_8bit).cpu().numpy(), Passes(), seconds)


def _attack_record(attacked: Attacked, clean_right: np.ndarray, spec: AttackSpec | None) -> dict[str, Any]:
    right = worst_case(clean_right, attacked.right)
    record: dict[str, Any] = {
        "acc_robust": accuracy(right),
        "asr": attack_success_rate(clean_right, right),
        "acc_robust_8bit": accuracy(worst_case(clean_right, attacked.right_8bit)),
        "seconds": attacked.seconds,
    }
    if spec is not None:
        passes = attacked.passes
        record |= {"name": spec.name, "steps": spec.steps, "restarts": spec.restarts}
        record["passes"] = {"forward": passes.full_forward, "backward": passes.full_backward}
        record["nonfinite_gradients"] = attacked.nonfinite
    return record


def _curve(
    subject: Pipeline,
    samples: Sequence[Sample],
    spec: AttackSpec,
    threat: ThreatModel,
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[dict[str, Any]]:
    radii = CURVE_EPS if threat.norm == "linf" else tuple(threat.eps * s for s in (1 / 8, 1 / 4, 1 / 2, 1, 1.5, 2))
    points: list[dict[str, Any]] = []
    for eps in sorted({*radii, threat.eps}):
        attacked = run_attack(
            subject, samples, spec, ThreatModel(threat.norm, eps), batch_size=batch_size, seed=seed, progress=progress
        )
        points.append({"eps": eps, "acc_robust": accuracy(attacked.right), "attack": spec.key})
    return points


def _add_consistency(measured: Measured, subject: Pipeline, samples: Sequence[Sample], batch_size: int) -> None:
    """S_c with the model's own answers, clean and attacked; the detector that thresholds it."""
    clean = own_scores(subject, samples, measured.clean, batch_size)
    attacked = {k: own_scores(subject, samples, a.adv, batch_size) for k, a in measured.attacked.items()}
    first = next(iter(attacked), None)
    if first is None:
        return
    record, adv = measured.record, attacked[first]
    record["s_c"] = {"clean": _distribution(clean), "adversarial": _distribution(adv), "attack": first}
    fpr, tpr = roc_curve(clean, adv)
    keep = np.unique(np.linspace(0, len(fpr) - 1, 200).astype(int))
    detection: dict[str, Any] = {
        "auroc": auroc(clean, adv),
        "tpr_at_1_fpr": tpr_at_fpr(clean, adv, 0.01),
        "tpr_at_5_fpr": tpr_at_fpr(clean, adv, 0.05),
        "roc": {"fpr": fpr[keep].tolist(), "tpr": tpr[keep].tolist()},
    }
    if subject.threshold is not None:
        tau = subject.threshold.tau
        pairs = [(measured.attacked[k].right, scores >= tau) for k, scores in attacked.items()]
        detection["threshold"] = tau
        detection["clean_rejection_rate"] = float((clean < tau).mean())
        detection["acc_robust_with_rejection"] = rejection_accuracy(measured.clean_right, clean >= tau, *pairs)
    record["detection"] = detection


def own_scores(subject: Pipeline, samples: Sequence[Sample], images: Sequence[Tensor], batch_size: int) -> np.ndarray:
    """S_c (N,) of images in [0, 1], one a sample, with the model's own answers."""
    parts = [
        subject.score(part, subject.generate(part, images[i : i + batch_size]), images[i : i + batch_size])
        for i in range(0, len(samples), batch_size)
        for part in (samples[i : i + batch_size],)
    ]
    return torch.cat(parts).double().cpu().numpy()


def _distribution(scores: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(scores, bins=40, range=(-1, 1))
    return {
        "mean": float(scores.mean()),
        "quantiles": {str(q): float(np.quantile(scores, q)) for q in QUANTILES},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _eps_text(threat: ThreatModel) -> str:
    return f"{threat.norm} {threat.eps * 255:.3g}/255" if threat.norm == "linf" else f"l2 {threat.eps:.3g}"
