"""Sanity checks: is an evaluation strong enough to be trusted? A failed check is shown in the report."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.evaluation.protocol import Measured
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.surface import victim_of
from cmai_fast.threat import ThreatModel

Check = dict[str, Any]
_LARGE_EPS = 128 / 255  # every image can be made plain grey
# Both attacks: if a model is sure of its answer, the cross-entropy is flat, and PGD, which does not return to the best
# point, gets lost in a large ball (robust accuracy of an immunised model: 16%, under APGD-CE-100 2%).
_LARGE = (AttackSpec("pgd", 50), AttackSpec("apgd", 100))
_SMALL = AttackSpec("pgd", 5)
_BY_QUERIES = 0.02  # more of the samples than this broken by queries alone: gradients are hidden
_SAME = 1e-3  # of the features of an image, from one pass to the next
_WITHOUT_GRADIENT = 0.1  # from this share of steps with zero gradients on, an attack counts as blind to a sample


def sanity_checks(measured: Measured, threat: ThreatModel, *, must_break: bool, limit: int = 128) -> list[Check]:
    """The checks for one measured model; attacks that have to run again use its first `limit` samples.

    Args:
        must_break: the model is undefended, so an attack that does not break it is too weak.
    """
    record, runner = measured.record, measured.runner
    few = list(range(min(limit, len(runner.samples))))
    checks = [_falls_with_eps(record["curve"])] if record.get("curve") else []
    if record.get("curve") and any(a.get("steps") for a in record["attacks"].values()):
        checks.append(_more_steps(record, threat))
    if _can_be_grey(threat):
        checks.append(_large_eps(runner, few))
    checks += [_finite_gradients(record), _gradients_exist(measured), _noise(measured, threat), _rounding(record)]
    checks += [*_queries(record), _same_features(runner, few[:8])]
    if "transfer" in record["attacks"] and len(record["attacks"]) > 1:
        checks.append(_white_box(measured))
    checks.append(_batch_size(runner, few[:24], threat))
    if must_break:
        passed = record["acc_robust"] < 0.5 * record["acc_clean"]
        checks.append(_check("the undefended model breaks", passed, record["acc_robust"], record["acc_clean"]))
    return checks


def stages(name: str, count: int, threat: ThreatModel, limit: int = 128) -> dict[str, float]:
    """The stages of `sanity_checks`, as those of `protocol.stages`."""
    few = min(limit, count)
    found = {_large_stage(spec): (spec.passes + 6.0) * few for spec in _LARGE} if _can_be_grey(threat) else {}
    found |= {"noise": 6.0 * count} | {_batch_stage(k): (_SMALL.passes + 6.0) * min(24, few) for k in (1, 2)}
    return {f"{name}: {stage}": cost for stage, cost in found.items()}


def _can_be_grey(threat: ThreatModel) -> bool:
    return threat.norm == "linf" and threat.surface.name != "patch"


def _large_stage(spec: AttackSpec) -> str:
    return f"check of a large ball, {spec.key}"


def _batch_stage(run: int) -> str:
    return f"check of the batch size, {run} of 2"


def _check(name: str, passed: bool, *shares: float, detail: str = "") -> Check:
    words = detail or ", ".join(f"{s:.1%}" for s in shares)
    return {"check": name, "passed": bool(passed), "detail": words}


def _falls_with_eps(curve: list[dict[str, Any]]) -> Check:
    shares = [p["acc_robust"] for p in curve]
    # The attacks at each eps are independent, so one point of slack.
    passed = all(b <= a + 0.01 for a, b in itertools.pairwise(shares))
    return _check("robust accuracy falls with eps", passed, *shares)


def _more_steps(record: dict[str, Any], threat: ThreatModel) -> Check:
    """The curve's attack is the weaker one, and ran on every sample, as did the first of the suite."""
    weak = next(p["acc_robust"] for p in record["curve"] if p["eps"] == threat.eps)
    strong = min(a["acc_robust"] for a in record["attacks"].values() if a.get("steps"))
    return _check("more steps never help the defender", strong <= weak + 0.005, strong, weak)


def _large_eps(runner: Runner, few: list[int]) -> Check:
    right = runner.clean().right
    standing = [i for i in few if right[i]]
    for spec in _LARGE:
        attacked = runner.attack(
            spec, ThreatModel("linf", _LARGE_EPS, runner.surface), standing, stage=_large_stage(spec), brief=True
        )  # fmt: skip
        standing = [i for i, still in zip(attacked.rows, attacked.right, strict=True) if still]
    share, names = len(standing) / len(few), " and ".join(spec.key for spec in _LARGE)
    return _check("nothing survives eps 128/255", share <= 0.05, detail=f"{share:.1%} under {names}, n {len(few)}")


def _finite_gradients(record: dict[str, Any]) -> Check:
    """Steps treat NaN as 0 and stop at infinity, so an attack with such gradients is too weak."""
    bad = sum(attack.get("nonfinite_gradients", 0) for attack in record["attacks"].values())
    return _check("gradients are finite", bad == 0, detail=f"{bad:,} NaN or infinite elements")


def _gradients_exist(measured: Measured) -> Check:
    """Samples that survive because attacks had no gradient are not robust: a rounded input, a saturated loss."""
    blind = np.zeros(len(measured.runner.samples), dtype=bool)
    standing = measured.clean.right.copy()
    for key, attacked in measured.attacked.items():
        entry = measured.record["attacks"][key]
        if steps := entry.get("steps", 0) * entry.get("restarts", 1):
            standing[attacked.rows] &= attacked.right | _rejected(measured, key)
            blind[attacked.rows] |= attacked.zero_gradients >= max(1, _WITHOUT_GRADIENT * steps)
    count, of = int((blind & standing).sum()), int(standing.sum())
    detail = f"{count} of {of} samples that stand under them had gradients of exactly 0"
    return _check("gradients are not zero", count == 0, detail=detail)


def _rejected(measured: Measured, key: str) -> np.ndarray:
    """(M,) bool: inputs of an attack on the guard that it rejects, which stand as right answers do."""
    attacked, threshold = measured.attacked[key], measured.runner.pipeline.threshold
    if threshold is None or attacked.scores is None or not ATTACKS[measured.record["attacks"][key]["name"]].guard:
        return np.zeros(len(attacked.rows), dtype=bool)
    return attacked.scores < threshold.tau


def _queries(record: dict[str, Any]) -> list[Check]:
    """An attack without gradients is weaker. It runs on what gradients have left, so what it breaks, they missed."""
    found = [a for a in record["attacks"].values() if a.get("name") in ATTACKS and ATTACKS[a["name"]].queries]
    if not found or len(found) == len(record["attacks"]):
        return []
    broken, of = sum(a["broken"] for a in found), record["n"]
    detail = f"{broken} of {of} samples broke by queries alone, after the attacks along gradients"
    return [_check("gradients find what queries find", broken <= _BY_QUERIES * of, detail=detail)]


def _same_features(runner: Runner, few: list[int]) -> Check:
    """Two passes over the same images. A model that changes its input at random needs attacks over its mean."""
    victim = victim_of(runner.pipeline, runner.pipeline.collate([runner.samples[i] for i in few]))
    with victim.attack_mode(), torch.no_grad():
        model_input = victim.space.to_model(victim.pixels())
        one, two = (victim.encode(model_input).float() for _ in range(2))
    far = float((one - two).norm() / one.norm().clamp_min(torch.finfo(one.dtype).tiny))
    detail = f"{far:.1e} apart" + ("" if far <= _SAME else "; attack the mean over its randomness (MeanOverTransforms)")
    return _check("the same image gives the same features", far <= _SAME, detail=detail)


def _noise(measured: Measured, threat: ThreatModel) -> Check:
    right = measured.runner.noise(threat, measured.runner.seed + 1)
    share, robust = float(right.mean()), measured.record["acc_robust"]
    return _check("random noise is weaker than gradients", share >= robust, share, robust)


def _rounding(record: dict[str, Any]) -> Check:
    exact, rounded = record["acc_robust"], record["acc_robust_8bit"]
    return _check("8-bit images give the same verdict (within 2 points)", abs(exact - rounded) <= 0.02, exact, rounded)


def _white_box(measured: Measured) -> Check:
    """Compares on the samples whose clean answer is right: transferred images, and attacks on the model itself."""
    attacks, count = measured.record["attacks"], len(measured.runner.samples)
    white_box = min(a["acc_robust"] for k, a in attacks.items() if k != "transfer")
    transfer = float(measured.attacked["transfer"].right.sum() / count)
    return _check("white-box attacks beat transferred ones", white_box <= transfer, white_box, transfer)


def _batch_size(runner: Runner, few: list[int], threat: ThreatModel) -> Check:
    """Both runs start from the samples, not from stored results of `runner`."""
    sizes = (len(few), max(1, len(few) // 3))
    runs = []
    for place, size in enumerate(sizes, 1):
        runs.append(runner.resized(size).attack(_SMALL, threat, few, stage=_batch_stage(place), brief=True).right)
    same = float(np.mean(runs[0] == runs[1]))
    return _check("results do not depend on the batch size", same == 1.0, detail=f"{same:.1%} of verdicts equal")
