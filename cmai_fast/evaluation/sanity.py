"""Checks that an evaluation is strong enough to be believed. Each can fail, and a failure is shown, not hidden."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cmai_fast.attacks.state import random_start
from cmai_fast.data import Sample
from cmai_fast.evaluation.protocol import AttackSpec, Measured, batches, is_right, run_attack
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel

Check = dict[str, Any]
_LARGE_EPS = 128 / 255  # every image can be made plain grey


def sanity_checks(
    subject: Pipeline,
    samples: Sequence[Sample],
    measured: Measured,
    threat: ThreatModel,
    *,
    must_break: bool,
    limit: int = 128,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> list[Check]:
    """The checks for one measured model, on at most `limit` samples where an attack has to be run again.

    Args:
        must_break: the model is undefended, so an attack that leaves it standing is too weak.
    """
    record, few = measured.record, samples[:limit]
    checks = [_falls_with_eps(record["curve"])] if record.get("curve") else []
    if record.get("curve"):
        checks.append(_more_steps(record, threat))
    if threat.norm == "linf":
        checks.append(_large_eps(subject, few, batch_size, seed, progress))
    checks.append(_finite_gradients(record))
    checks.append(_noise(subject, samples, measured, threat, batch_size, seed))
    checks.append(_rounding(record))
    if "transfer" in record["attacks"]:
        white_box = min(a["acc_robust"] for k, a in record["attacks"].items() if k != "transfer")
        transfer = record["attacks"]["transfer"]["acc_robust"]
        checks.append(_check("white-box attacks beat transferred ones", white_box <= transfer, white_box, transfer))
    checks.append(_batch_size(subject, few[:24], threat, seed))
    if must_break:
        passed = record["acc_robust"] < 0.5 * record["acc_clean"]
        checks.append(_check("the undefended model breaks", passed, record["acc_robust"], record["acc_clean"]))
    return checks


def _check(name: str, passed: bool, *shares: float, detail: str = "") -> Check:
    words = detail or ", ".join(f"{s:.1%}" for s in shares)
    return {"check": name, "passed": bool(passed), "detail": words}


def _falls_with_eps(curve: list[dict[str, Any]]) -> Check:
    shares = [p["acc_robust"] for p in curve]
    # The attack at each eps is a search of its own: one point of slack for what it may miss.
    passed = all(b <= a + 0.01 for a, b in itertools.pairwise(shares))
    return _check("robust accuracy falls with eps", passed, *shares)


def _more_steps(record: dict[str, Any], threat: ThreatModel) -> Check:
    weak = next(p["acc_robust"] for p in record["curve"] if p["eps"] == threat.eps)
    strong = min(a["acc_robust"] for a in record["attacks"].values() if a.get("steps"))
    return _check("more steps never help the defender", strong <= weak + 0.005, strong, weak)


def _large_eps(subject: Pipeline, samples: Sequence[Sample], batch_size: int, seed: int, progress: bool) -> Check:
    # Both attacks: where a model is sure of its answer the cross-entropy is flat, and PGD, which does not go back to
    # the best point it saw, loses its way in a large ball (an immunised model kept 16%, under APGD-CE-100 2%).
    standing, specs = list(samples), (AttackSpec("pgd", 50), AttackSpec("apgd", 100))
    for spec in specs:
        if standing:
            attacked = run_attack(
                subject, standing, spec, ThreatModel("linf", _LARGE_EPS), batch_size=batch_size, seed=seed,
                progress=progress,
            )  # fmt: skip
            standing = [s for s, right in zip(standing, attacked.right, strict=True) if right]
    share, names = len(standing) / len(samples), " and ".join(spec.key for spec in specs)
    return _check("nothing survives eps 128/255", share <= 0.05, detail=f"{share:.1%} under {names}, n {len(samples)}")


def _finite_gradients(record: dict[str, Any]) -> Check:
    """A step takes NaN for 0 and stops at infinity: an attack on such gradients is no attack."""
    bad = sum(attack.get("nonfinite_gradients", 0) for attack in record["attacks"].values())
    return _check("gradients are finite", bad == 0, detail=f"{bad:,} NaN or infinite elements")


def _noise(
    subject: Pipeline, samples: Sequence[Sample], measured: Measured, threat: ThreatModel, batch_size: int, seed: int
) -> Check:
    right = []
    for objective, clean, sample_ids in batches(subject, samples, batch_size, "noise", False):
        noisy, rows = torch.empty_like(clean), torch.arange(len(clean), device=clean.device)
        eps = torch.full((len(clean),), threat.eps, device=clean.device)
        random_start(objective, noisy, clean, eps, sample_ids.to(clean.device), rows, seed + 1, threat.norm)
        right.append(is_right(subject, noisy, objective))
    share, robust = float(torch.cat(right).float().mean()), measured.record["acc_robust"]
    return _check("random noise is weaker than gradients", share >= robust, share, robust)


def _rounding(record: dict[str, Any]) -> Check:
    exact, rounded = record["acc_robust"], record["acc_robust_8bit"]
    return _check("8-bit images give the same verdict (within 2 points)", abs(exact - rounded) <= 0.02, exact, rounded)


def _batch_size(subject: Pipeline, samples: Sequence[Sample], threat: ThreatModel, seed: int) -> Check:
    spec, sizes = AttackSpec("pgd", 5), (len(samples), max(1, len(samples) // 3))
    runs = [run_attack(subject, samples, spec, threat, batch_size=b, seed=seed).right for b in sizes]
    same = float(np.mean(runs[0] == runs[1]))
    return _check("results do not depend on the batch size", same == 1.0, detail=f"{same:.1%} of verdicts equal")
