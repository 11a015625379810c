"""The evaluation protocol of one model: clean, under a suite of attacks, over eps, and with its own detector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from cmai_fast.attacks import ATTACKS
from cmai_fast.data import Sample
from cmai_fast.evaluation.answers import Answers, Attacked
from cmai_fast.evaluation.goals import Worst, reaches
from cmai_fast.evaluation.parts import Parts
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.recall import recall
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.state import State
from cmai_fast.evaluation.suite import AttackSpec, check_suite
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
from cmai_fast.metrics import measure as measure_all
from cmai_fast.pipeline import Pipeline
from cmai_fast.tasks import Task, ranks
from cmai_fast.threat import ThreatModel

CURVE_EPS = (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 24 / 255)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass
class Measured:
    """The record for results.json, and the answers and verdicts behind it."""

    record: dict[str, Any]
    clean: Answers
    attacked: dict[str, Attacked]
    runner: Runner = field(repr=False)


def measure(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    threat: ThreatModel,
    suite: Sequence[AttackSpec],
    *,
    curve: AttackSpec | None = None,
    transferred: Mapping[str, Mapping[int, Tensor]] | None = None,
    training: Sequence[Sample] = (),
    task: Task | str = "vqa",
    metrics: Sequence[str] = (),
    batch_size: int = 64,
    seed: int = 0,
    state: State | None = None,
    progress: Overall | None = None,
) -> Measured:
    """All measurements of one model, as a JSON-ready record.

    A sample whose clean answer is wrong is not attacked, and a sample broken by one attack is not attacked by the next.
    It stays in the suite only while a number of the record could still change: until an image breaks it that also does
    so when rounded to 8 bits and, with a threshold, is accepted by the detector. So all numbers equal those of running
    every attack on every sample.

    Args:
        suite: Acc_robust counts the worst of these per sample; attacks on a guard are left out for a model without one,
            and attacks that have nothing to aim at (`AttackSpec.other`, `reference`) too. The first attack runs on
            every sample whose clean answer is right; its images are kept, and give S_c of attacked inputs.
        curve: the attack for robust accuracy over eps; None leaves out the curve.
        transferred: adversarial images of other models for the same samples, by name and row. They join the suite, and
            are tried on every sample whose clean answer is right.
        training: other samples, on which universal attacks find what they add to every image.
        task, state, batch_size, seed, progress: as for `Runner`.
        metrics: names of corpus metrics to report beside the task's own.
    """
    check_suite(suite)
    runner = Runner(
        pipeline, samples, task=task, surface=threat.surface, training=training, state=state, batch_size=batch_size,
        seed=seed, progress=progress,
    )  # fmt: skip
    measured = Measured({}, runner.clean(), {}, runner)
    standing = measured.clean.right.copy()
    left_out = {spec.key: "the model has no guard" for spec in suite if spec.attacks_guard and not pipeline.guarded}
    left_out |= {spec.key: "no sample has such an answer" for spec in suite if not runner.aims(spec)}
    if left_out:
        measured.record["left_out"] = left_out
    suite = [spec for spec in suite if spec.key not in left_out]
    moved = []  # what `recall` ranks: also samples that were wrong before, whose ranks can still fall
    worst = Worst() if any(spec.again for spec in suite) else None
    for i, spec in enumerate(suite):
        if ranks(runner.task):
            whole = runner.attack(spec, threat, range(len(standing)), keep=True)
            if not ATTACKS[spec.name].text:  # with its own captions changed, an image has another gallery
                moved.append((whole, whole.images))
            attacked = whole.among(measured.clean.right)
        else:
            attacked = runner.attack(
                spec, threat, np.flatnonzero(standing).tolist(), keep=i == 0 or worst is not None,
                starts=worst if spec.again else None,
            )  # fmt: skip
        measured.attacked[spec.key] = attacked
        standing[attacked.rows] = ~_settled(pipeline, attacked)
        if worst is not None:
            worst.see(attacked.rows, _scores(runner, attacked), attacked.images, spec)
    for name, images in (transferred or {}).items():
        measured.attacked[name] = runner.transfer(images, threat, name=name)
        moved.append((measured.attacked[name], images))
    _add_accuracy(measured, {spec.key: spec for spec in suite})
    measured.record["metrics"] = _corpus_metrics(measured, metrics)
    if ranks(runner.task):
        for kind, found in recall(runner, moved, batch_size).items():
            if kind == "clean" or moved or not suite:
                measured.record["metrics"][kind] |= found
    if curve is not None:
        measured.record["curve"] = _curve(runner, curve, threat)
    if pipeline.scores:
        _add_consistency(measured)
    return measured


def _scores(runner: Runner, attacked: Attacked) -> list[float]:
    pairs = zip(attacked.rows, attacked.predictions, strict=True)
    return [runner.task.score(text, runner.samples[row]) for row, text in pairs]


def _settled(pipeline: Pipeline, attacked: Attacked) -> np.ndarray:
    """(M,) bool: no further attack on the sample can change a number."""
    broken = ~attacked.right & ~attacked.right_8bit
    if pipeline.threshold is None or attacked.scores is None:
        return broken
    return broken & (attacked.scores >= pipeline.threshold.tau)


def _add_accuracy(measured: Measured, specs: Mapping[str, AttackSpec]) -> None:
    """Accuracies, ASR and their intervals, in total and per attack in the order in which they ran."""
    clean, record, pipeline = measured.clean.right, measured.record, measured.runner.pipeline
    record |= {"acc_clean": accuracy(clean), "n": len(clean), "task": measured.runner.task.name}
    record["precision"] = str(pipeline.model.dtype)
    record["acc_clean_interval"] = list(bootstrap_interval(clean.astype(float)))
    robust, robust_8bit, attacks = clean, clean, {}
    for key, attacked in measured.attacked.items():
        robust = worst_case(robust, attacked.over(len(clean), attacked.right))
        robust_8bit = worst_case(robust_8bit, attacked.over(len(clean), attacked.right_8bit))
        attacks[key] = _attack_record(attacked, specs.get(key)) | {
            "acc_robust": accuracy(robust),
            "acc_robust_8bit": accuracy(robust_8bit),
        }
    record["acc_robust"], record["acc_robust_8bit"] = accuracy(robust), accuracy(robust_8bit)
    record["acc_robust_interval"] = list(bootstrap_interval(robust.astype(float)))
    record["asr"] = attack_success_rate(clean, robust)
    record["attacks"] = attacks


def _attack_record(attacked: Attacked, spec: AttackSpec | None) -> dict[str, Any]:
    """`attacked` is the number of samples that the attack ran on, `broken` the number it made wrong, `asr` their ratio.

    `per_sample`: the mean number of passes of the whole model that an attacked sample was in. For a targeted attack,
    `reached` samples gave the target, and `asr_target` is their share. The caller adds `acc_robust` and
    `acc_robust_8bit`, which are cumulative over this attack and those before it.
    """
    count, broken = len(attacked.rows), int((~attacked.right).sum())
    record: dict[str, Any] = {
        "attacked": count,
        "broken": broken,
        "asr": broken / count if count else None,
        "seconds": attacked.seconds,
    }
    if spec is not None:
        record |= spec.to_dict() | {"label": spec.label}
        record["passes"] = {"forward": attacked.passes.full_forward, "backward": attacked.passes.full_backward}
        if count:
            record["per_sample"] = {
                "forward": float(attacked.forwards.mean()), "backward": float(attacked.backwards.mean())
            }  # fmt: skip
        if spec.target is not None:
            reached = sum(reaches(spec, text) for text in attacked.predictions)
            record |= {"reached": reached, "asr_target": reached / count if count else None}
        record["nonfinite_gradients"] = int(attacked.nonfinite.sum())
        record["zero_gradients"] = int(attacked.zero_gradients.sum())
    return record


def worst_answers(measured: Measured) -> list[str]:
    """Per sample, the generated text with the lowest score, clean or under any attack; the first if several tie."""
    runner, worst = measured.runner, list(measured.clean.predictions)
    task, samples = runner.task, runner.samples
    scores = [task.score(p, s) for p, s in zip(worst, samples, strict=True)]
    for attacked in measured.attacked.values():
        for row, text in zip(attacked.rows, attacked.predictions, strict=True):
            score = task.score(text, samples[row])
            if score < scores[row]:
                worst[row], scores[row] = text, score
    return worst


def _corpus_metrics(measured: Measured, names: Sequence[str]) -> dict[str, dict[str, float]]:
    runner = measured.runner
    return {
        kind: corpus_metrics(runner.task, names, predictions, runner.samples)
        for kind, predictions in (("clean", measured.clean.predictions), ("robust", worst_answers(measured)))
    }


def corpus_metrics(
    task: Task, names: Sequence[str], predictions: Sequence[str], samples: Sequence[Sample]
) -> dict[str, float]:
    """The task's own metrics, and those named from `METRICS`."""
    return {**task.metrics(predictions, samples), **measure_all(names, predictions, [s.references for s in samples])}


def curve_radii(threat: ThreatModel) -> list[float]:
    radii = CURVE_EPS if threat.norm == "linf" else tuple(threat.eps * s for s in (1 / 8, 1 / 4, 1 / 2, 1, 1.5, 2))
    return sorted({*radii, threat.eps})


def curve_stage(threat: ThreatModel, place: int) -> str:
    return f"curve {place + 1}, {threat.ball}"


def _curve(runner: Runner, spec: AttackSpec, threat: ThreatModel) -> list[dict[str, Any]]:
    """Robust accuracy under one attack at each radius, each an independent attack on all samples; with a score, its
    mean and 10% and 90% quantiles over the attacked inputs, and what the guard lets through of the wrong answers."""
    points, count, threshold = [], len(runner.samples), runner.pipeline.threshold
    for i, eps in enumerate(curve_radii(threat)):
        ball = replace(threat, eps=eps)
        attacked = runner.attack(spec, ball, stage=curve_stage(ball, i), brief=True)
        point = {"eps": eps, "acc_robust": float(attacked.right.sum() / count), "attack": spec.key}
        if attacked.scores is not None:
            low, high = np.quantile(attacked.scores, (0.1, 0.9))
            point["score"] = {"mean": float(attacked.scores.mean()), "low": float(low), "high": float(high)}
        if attacked.scores is not None and threshold is not None:
            accepted = attacked.scores >= threshold.tau
            point["fooled_and_accepted"] = float((accepted & ~attacked.right).sum() / count)
        points.append(point)
    return points


def _add_consistency(measured: Measured) -> None:
    """S_c with the model's own answers, clean and under the first attack, and the detector that thresholds it.

    Attacked inputs are those of the first attack: the samples whose clean answer is right.
    """
    clean = measured.clean.scores
    if clean is None or not measured.attacked:
        return
    first = next(iter(measured.attacked))
    adv = measured.attacked[first].scores
    if adv is None or not len(adv):  # no sample was right
        return
    record, broken = measured.record, ~measured.attacked[first].right
    both = np.concatenate([clean, adv])
    record["s_c"] = {
        "clean": _distribution(clean, both), "adversarial": _distribution(adv, both), "attack": first,
        "score": "verifier" if measured.runner.pipeline.verifier is not None else "heads",
    }  # fmt: skip
    detection: dict[str, Any] = {
        "auroc": auroc(clean, adv),
        "auroc_successful": auroc(clean, adv[broken]) if broken.any() else None,
        "tpr_at_1_fpr": tpr_at_fpr(clean, adv, 0.01),
        "tpr_at_5_fpr": tpr_at_fpr(clean, adv, 0.05),
        "tpr_at_5_fpr_successful": tpr_at_fpr(clean, adv[broken], 0.05) if broken.any() else None,
        "roc": _roc(clean, adv),
        "successful": _successful(measured, clean),
    }
    threshold = measured.runner.pipeline.threshold
    if threshold is not None:
        detection |= _at_threshold(measured, clean, threshold.tau)
    record["detection"] = detection


def _roc(clean: np.ndarray, adv: np.ndarray) -> dict[str, list[float]]:
    """At most 200 points of the curve."""
    fpr, tpr = roc_curve(clean, adv)
    keep = np.unique(np.linspace(0, len(fpr) - 1, 200).astype(int))
    return {"fpr": fpr[keep].tolist(), "tpr": tpr[keep].tolist()}


def _successful(measured: Measured, clean: np.ndarray) -> dict[str, dict[str, Any]]:
    """Detection of the inputs of each attack that make the answer wrong; attacks without one are left out."""
    found = {}
    for key, attacked in measured.attacked.items():
        if attacked.scores is None or attacked.right.all():
            continue
        adv = attacked.scores[~attacked.right]
        rates = {f"tpr_at_{round(100 * fpr)}_fpr": tpr_at_fpr(clean, adv, fpr) for fpr in (0.01, 0.05)}
        found[key] = {"n": len(adv), "auroc": auroc(clean, adv), **rates, "roc": _roc(clean, adv)}
    return found


def _at_threshold(measured: Measured, clean: np.ndarray, tau: float) -> dict[str, Any]:
    """What the detector does at its threshold, over all attacks, and the share that each of them gets past it.

    A sample counts as fooled and accepted if its answer was right and an image makes it wrong with a score of at least
    the threshold. `fooled_and_accepted` of an attack is cumulative over it and those before it, as its `acc_robust`.
    """
    count, right = len(clean), measured.clean.right
    attacks = {key: attacked for key, attacked in measured.attacked.items() if attacked.scores is not None}
    passed, shares = np.zeros(count, dtype=bool), {}
    for key, attacked in attacks.items():
        assert attacked.scores is not None
        passed[attacked.rows] |= right[attacked.rows] & ~attacked.right & (attacked.scores >= tau)
        shares[key] = float(passed.mean())
    pairs = [
        (attacked.over(count, attacked.right), attacked.over(count, np.asarray(attacked.scores) >= tau))
        for attacked in attacks.values()
    ]
    return {
        "threshold": tau,
        "clean_rejection_rate": float((clean < tau).mean()),
        "acc_robust_with_rejection": rejection_accuracy(right, clean >= tau, *pairs),
        "fooled_and_accepted": float(passed.mean()),
        "fooled_and_accepted_by_attack": shares,
    }


def own_scores(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    batch_size: int,
    images: Sequence[Tensor] | None = None,
    progress: Overall | None = None,
) -> np.ndarray:
    """The score (N,) of the model's own answers, for the samples' own images or `images` as for `Pipeline.generate`."""

    def score(rows: list[int]) -> list[float]:
        return pipeline.answer([samples[i] for i in rows], None if images is None else [images[i] for i in rows])[1]

    found: list[float] = []
    for rows, scores in Parts(batch_size).over(range(len(samples)), score):
        found += scores
        if progress is not None:
            progress.advance(len(rows))
    return np.array(found)


def stages(
    name: str, count: int, threat: ThreatModel, suite: Sequence[AttackSpec], curve: AttackSpec | None, transfer: bool
) -> dict[str, float]:
    """The stages of `measure` for the model `name`, with the approximate number of forward passes of each."""
    found = {"clean": 6.0 * count}
    found |= {f"{spec.key} at {threat.ball}": (spec.passes + 12.0) * count for spec in suite}
    if transfer:
        found["transfer"] = 12.0 * count
    if curve is not None:
        for i, eps in enumerate(curve_radii(threat)):
            found[curve_stage(replace(threat, eps=eps), i)] = (curve.passes + 6.0) * count
    return {f"{name}: {stage}": cost for stage, cost in found.items()}


def _distribution(scores: np.ndarray, both: np.ndarray) -> dict[str, Any]:
    """`both`: the scores that share its bins. S_c is in [-1, 1], a margin anywhere."""
    low, high = (-1.0, 1.0) if np.abs(both).max() <= 1 else (math.floor(both.min()), math.ceil(both.max()))
    counts, edges = np.histogram(scores, bins=40, range=(low, high))
    return {
        "mean": float(scores.mean()),
        "quantiles": {str(q): float(np.quantile(scores, q)) for q in QUANTILES},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
