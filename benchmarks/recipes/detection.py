"""Detection of attacked inputs, static and adaptive, beside trivial detectors.

    python benchmarks/recipes/detection.py --model easyvqa-llava --eps 8/255 16/255 --out detection.json

Per radius: the suite (PGD, APGD-CE, then the adaptive attack) on test questions, the model's own detector over all
attacked inputs and over those that fooled the model, what is fooled and accepted at a share of false rejections
(`--rate`), and two trivial detectors: energy in high frequencies, and the model's own log p of its answer, on the same
images and under an adaptive attack of their own. `--heads DIR` takes another calibration, `--attacks` other attacks. On
all clean test questions: right answers that are accepted at 1% and 5% of false rejections, by kind, and wrong answers
that are rejected. What the file holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from cmai_fast.attacks import ATTACKS
from cmai_fast.attacks.deployed import Aim, Deployed
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.protocol import measure, own_scores, stages
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.runner import victim_of
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.versions import versions
from cmai_fast.metrics import auroc, threshold_at_fpr, tpr_at_fpr
from cmai_fast.pipeline import Pipeline
from cmai_fast.tasks import TASKS
from cmai_fast.threat import ThreatModel, parse_eps
from cmai_fast.workflows.samples import asked

DATA, TASK = DataSource("easyvqa"), "vqa"


def high_frequencies(images: list[Tensor]) -> np.ndarray:
    """Minus the energy of differences between neighbouring pixels (n,): low where an image is noisy."""
    return np.array([-(float(x.diff(dim=-1).square().mean()) + float(x.diff(dim=-2).square().mean())) for x in images])


def confidence(pipeline: Pipeline, samples: list[Any], answers: list[str], images: list[Tensor]) -> np.ndarray:
    """log p of the model's own answers (n,)."""
    found: list[float] = []
    for start in range(0, len(samples), 64):
        rows = slice(start, start + 64)
        said = [replace(s, references=(a,)) for s, a in zip(samples[rows], answers[rows], strict=True)]
        batch = pipeline.images(said)
        inputs = batch.inputs(batch.join(images[rows]))
        image, text = pipeline.bridge.inputs(inputs)
        with torch.no_grad():
            features = pipeline.bridge.encode_image(inputs["pixel_values"], **image)
            found += (-pipeline.bridge.losses(features, **text)[0]).tolist()
    return np.array(found)


def rates(clean: np.ndarray, attacked: np.ndarray, broken: np.ndarray) -> dict[str, float]:
    return {
        "auroc": auroc(clean, attacked),
        "auroc_successful": auroc(clean, attacked[broken]),
        "tpr_at_5_fpr_successful": tpr_at_fpr(clean, attacked[broken], 0.05),
    }


class Trivial(Deployed):
    """A guard that accepts where `score` (features, images, rows, batch with the answer) is at least tau."""

    def __init__(self, pipeline: Pipeline, samples: Sequence[Sample], tau: float, name: str) -> None:
        super().__init__(pipeline, samples)
        self.tau, self.scored_by = tau, name

    def wrong(self) -> list[list[str]]:
        return [list(s.wrong_choices) for s in self.samples]

    def frozen(self) -> Any:
        return nullcontext()

    def aim(self, answers: Sequence[str]) -> Aim:
        rows = [replace(s, references=(a,)) for s, a in zip(self.samples, answers, strict=True)]
        batch = self.pipeline.on_device(self.pipeline.collate(rows))
        victim, texts = self.pipeline.images(rows), self.pipeline.bridge.inputs(batch)[1]

        def high_frequencies(x: Tensor) -> Tensor:
            x = x * self.pipeline.space.like(x)[1]
            return -x.diff(dim=-1).square().mean((1, 2, 3)) - x.diff(dim=-2).square().mean((1, 2, 3))

        def excess(features: Tensor, tokens: Tensor | None, model_input: Tensor, rows: Tensor | None) -> Tensor:
            if self.scored_by == "high_frequencies":
                return (high_frequencies(model_input) - self.tau) * 1e3  # on the scale of log-probabilities
            own = {k: v if rows is None else v[rows] for k, v in texts.items()}
            return -victim.bridge.losses(features, **own)[0] - self.tau

        return Aim(texts, excess)


def evaded(
    pipeline: Pipeline, samples: list[Sample], name: str, tau: float, threat: ThreatModel, args: argparse.Namespace
) -> float:
    """The share of these samples for which the adaptive attack passes a trivial detector with a wrong answer."""
    fooled = 0
    for start in track(range(0, len(samples), 64), f"adaptive attack on {name}"):
        rows = samples[start : start + 64]
        batch = pipeline.on_device(pipeline.collate(rows))
        victim = victim_of(pipeline, batch)
        victim.deployed = Trivial(pipeline, rows, tau, name)
        result = ATTACKS["adaptive"](
            victim, victim.pixels(), threat, steps=args.steps, restarts=args.restarts, seed=0,
            sample_ids=batch["sample_ids"], targets=2,
        )  # fmt: skip
        fooled += int(result.fooled.sum())
    return fooled / len(samples)


def one_radius(pipeline: Pipeline, eps: float, args: argparse.Namespace, calibration: np.ndarray) -> dict[str, Any]:
    samples, threat = asked(DATA, "test", TASK, args.limit), ThreatModel("linf", eps)
    assert pipeline.threshold is not None
    tau = threshold_at_fpr(calibration, args.rate)
    pipeline.threshold = replace(pipeline.threshold, tau=tau, false_rejection_rate=args.rate)
    suite = [AttackSpec.parse(attack) for attack in args.attacks]
    if args.steps:
        suite.append(AttackSpec("adaptive", args.steps, args.restarts))
    with Overall(stages(pipeline.name, len(samples), threat, suite, None, False)) as progress:
        measured = measure(pipeline, samples, threat, suite, batch_size=64, progress=progress)
    kept = ("acc_clean", "acc_robust", "asr", "attacks", "detection")
    found = {k: measured.record[k] for k in kept}
    # The model without its guard, against the same attacks.
    found["fooled"] = float((measured.clean.right & ~_standing(measured)).mean())
    if not args.trivial:
        return found
    first = measured.attacked[suite[0].key]
    runner, broken = measured.runner, ~first.right
    own, moved = runner.images(range(len(samples))), [first.images[i] for i in first.rows]
    attacked = [samples[i] for i in first.rows]
    said = confidence(pipeline, samples, measured.clean.predictions, own)
    clean = {"high_frequencies": high_frequencies(own), "confidence": said}
    adv = {
        "high_frequencies": high_frequencies(moved),
        "confidence": confidence(pipeline, attacked, first.predictions, moved),
    }
    found["trivial"] = {
        name: rates(clean[name], adv[name], broken)
        | {
            "fooled_and_accepted_adaptive": evaded(
                pipeline, samples, name, threshold_at_fpr(clean[name], args.rate), threat, args
            )
        }
        for name in clean
    }
    return found


def clean_answers(pipeline: Pipeline, calibration: np.ndarray) -> dict[str, Any]:
    """What the guard does to the clean test split: all answers, those of each kind, and natural mismatches (the
    question with one of its wrong answers)."""
    samples, rng = asked(DATA, "test", TASK, None), np.random.default_rng(0)
    task = TASKS[TASK]
    said: list[str] = []
    scores: list[float] = []
    other: list[float] = []
    for start in track(range(0, len(samples), 128), "clean answers"):
        rows = samples[start : start + 128]
        answers, own = pipeline.answer(rows)
        wrong = [s.wrong_choices[rng.integers(len(s.wrong_choices))] for s in rows]
        said, scores = said + answers, scores + list(own)
        other += pipeline.score(rows, wrong).tolist()
    right = np.array([task.score(a, s) >= 1 for a, s in zip(said, samples, strict=True)])
    kinds = np.array([s.answer if s.answer in ("yes", "no") else "colour or shape" for s in samples])
    groups = {"all": np.ones_like(right)} | {kind: kinds == kind for kind in np.unique(kinds)}
    found: dict[str, Any] = {"n": len(samples), "right": float(right.mean())}
    for rate in (0.01, 0.05):
        tau = threshold_at_fpr(calibration, rate)
        accepted, passed = np.array(scores) >= tau, np.array(other) >= tau
        found[f"{rate:.0%} false rejections"] = {
            "right_and_accepted": {k: float((accepted & right)[rows].mean()) for k, rows in groups.items()},
            "wrong_of_accepted": float((accepted & ~right).sum() / max(accepted.sum(), 1)),
            "mismatches_rejected": {k: float((~passed)[rows].mean()) for k, rows in groups.items()},
        }
    return found


def _standing(measured: Any) -> np.ndarray:
    """(N,) bool: right under every attack."""
    standing = measured.clean.right.copy()
    for attacked in measured.attacked.values():
        standing[attacked.rows] &= attacked.right
    return standing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--eps", type=parse_eps, nargs="*", default=[8 / 255, 16 / 255])
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100, help="of the adaptive attack; 0: none, with --no-trivial")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.05, help="share of clean inputs that the threshold may reject")
    parser.add_argument("--attacks", nargs="*", default=["pgd:50x2", "apgd:100"], help="before the adaptive one")
    parser.add_argument("--no-clean", dest="clean", action="store_false", help="leave out all clean test questions")
    parser.add_argument("--no-trivial", dest="trivial", action="store_false", help="leave out the trivial detectors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline = Pipeline.load(args.model, heads=args.heads)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    settings = {
        "model": args.model, "heads": args.heads.name if args.heads else None, "n": args.limit,
        "adaptive": f"{args.steps} steps, {args.restarts} restarts, 2 targets",
    }  # fmt: skip
    if args.attacks != parser.get_default("attacks"):
        settings["attacks"] = args.attacks
    if {k: v for k, v in results.get("settings", settings).items() if k != "versions"} != settings:
        raise SystemExit(f"{args.out} holds results of other settings; name another --out")
    results["settings"] = settings | {"versions": versions()}
    held_out = asked(DATA, "calibration", TASK, 1000)
    calibration = own_scores(pipeline, held_out, 128)
    if args.clean and "clean" not in results:
        results["clean"] = clean_answers(pipeline, calibration)
        write_results(results, args.out)
    for eps in args.eps:
        key = f"{eps * 255:g}/255, {args.rate:.0%} false rejections"
        if key in results:
            continue
        results[key] = one_radius(pipeline, eps, args, calibration)
        write_results(results, args.out)


if __name__ == "__main__":
    main()
