"""Detection of attacked inputs, static and adaptive, beside trivial detectors.

    python benchmarks/recipes/detection.py --model easyvqa-llava --eps 8/255 16/255 --out detection.json

Per radius: the suite (PGD, APGD-CE, then the adaptive attack) on test questions, the model's own detector over all
attacked inputs and over those that fooled the model, what is fooled and accepted at 1% and at 5% false rejections, and
two trivial detectors on the same images: energy in high frequencies, and the entropy of the model's next-token
probabilities. `--heads DIR` takes another calibration. Radii that the file holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.protocol import measure, own_scores, stages
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.versions import versions
from cmai_fast.metrics import auroc, threshold_at_fpr, tpr_at_fpr
from cmai_fast.pipeline import Pipeline
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


def one_radius(pipeline: Pipeline, eps: float, args: argparse.Namespace, calibration: np.ndarray) -> dict[str, Any]:
    samples, threat = asked(DATA, "test", TASK, args.limit), ThreatModel("linf", eps)
    static = [AttackSpec("pgd", 50, 2), AttackSpec("apgd", 100)]
    found: dict[str, Any] = {}
    for share in (0.05, 0.01):
        assert pipeline.threshold is not None
        tau = threshold_at_fpr(calibration, share)
        pipeline.threshold = replace(pipeline.threshold, tau=tau, false_rejection_rate=share)
        suite = [*static, AttackSpec("adaptive", args.steps, args.restarts)]
        with Overall(stages(pipeline.name, len(samples), threat, suite, None, False)) as progress:
            measured = measure(pipeline, samples, threat, suite, batch_size=64, progress=progress)
        record = {k: v for k, v in measured.record["detection"].items() if k != "roc"}
        found[f"{share:.0%} false rejections"] = record | {
            k: measured.record[k] for k in ("acc_clean", "acc_robust", "asr", "attacks")
        }
        if share == 0.05:
            first = measured.attacked[static[0].key]
            runner, broken = measured.runner, ~first.right
            own, moved = runner.images(range(len(samples))), [first.images[i] for i in first.rows]
            attacked = [samples[i] for i in first.rows]
            found["trivial"] = {
                "high_frequencies": rates(high_frequencies(own), high_frequencies(moved), broken),
                "confidence": rates(
                    confidence(pipeline, samples, measured.clean.predictions, own),
                    confidence(pipeline, attacked, first.predictions, moved), broken,
                ),
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--eps", type=parse_eps, nargs="*", default=[8 / 255, 16 / 255])
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100, help="of the adaptive attack")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipeline = Pipeline.load(args.model, heads=args.heads)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    held_out = asked(DATA, "calibration", TASK, 1000)
    calibration = own_scores(pipeline, held_out, 128)
    for eps in args.eps:
        key = f"{eps * 255:g}/255"
        if key in results:
            continue
        results[key] = one_radius(pipeline, eps, args, calibration)
        results["settings"] = {
            "model": args.model, "heads": str(args.heads) if args.heads else None, "n": args.limit,
            "adaptive": f"{args.steps} steps, {args.restarts} restarts, 2 targets", "versions": versions(),
        }  # fmt: skip
        write_results(results, args.out)


if __name__ == "__main__":
    main()
