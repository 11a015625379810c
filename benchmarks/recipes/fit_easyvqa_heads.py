"""Fits consistency heads to a bundled model without changing it, calibrates their threshold, and saves both.

python benchmarks/recipes/fit_easyvqa_heads.py --model cmai_fast/models/easyvqa-llava
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import Progress

from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.fit import fit_heads, fit_threshold
from cmai_fast.data.sources import DataSource
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows.samples import asked, training_batches, training_samples
from cmai_fast.workflows.training import calibration_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", default="easyvqa")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = DataSource(args.data)
    subject = Pipeline.load(str(args.model))
    heads = ConsistencyHeads(subject.bridge.image_dim, subject.bridge.text_dim)
    with Progress() as progress:
        bar = progress.add_task("heads", total=args.steps)
        stream = training_batches(subject, training_samples(data, "vqa"), 64, args.seed)
        fit_heads(subject.bridge, heads, stream, args.steps, on_step=lambda step, loss: progress.advance(bar))
    subject.heads = heads
    scores = calibration_scores(subject, asked(data, "calibration", "vqa", 1000, args.seed))
    heads.save_pretrained(args.model / "cmcv", fit_threshold(scores, "calibration", generation=subject.generation))
    low = scores.quantile(0.05)
    print(f"S_c on {len(scores)} clean calibration questions: mean {scores.mean():.3f}, 5% quantile {low:.3f}")


if __name__ == "__main__":
    main()
