"""What training against attacks on the text adds: the immunised model, trained further against each kind of attack.

    python benchmarks/recipes/modality.py --steps 200 --limit 300 --out benchmarks/results/modality.json

Each row continues from `easyvqa-llava-immune` for the same steps with `MBATConfig(modality=...)`, and is then attacked
by PGD on images, on the words of the prompt, and on both. A question is robust if the answer stays right at every step,
under teacher forcing. Rows that the file holds are not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.runner import victim_of
from cmai_fast.evaluation.versions import versions
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat.robust_eval import verdicts
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel, WordBall, parse_eps
from cmai_fast.workflows.samples import asked, training_samples

DATA, TASK = DataSource("easyvqa"), "vqa"
ROWS = ("none", "image", "text", "both")


def trained(pipeline: Pipeline, row: str, args: argparse.Namespace) -> dict[str, float]:
    config = MBATConfig(
        output_dir=str(args.work / row), modality=row, eps=args.eps, text_eps=args.text_eps, inner_steps=4, refreshes=1,
        beta=0.0, gamma=0.0, max_steps=args.steps, per_device_train_batch_size=32, learning_rate=args.learning_rate,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=args.seed, logging_steps=50,
    )  # fmt: skip
    samples = training_samples(DATA, TASK)
    trainer = MBATTrainer(pipeline.model, config, train_dataset=samples, processing_class=pipeline.processor)
    before, start = time.process_time(), time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - before}


def attacked(pipeline: Pipeline, args: argparse.Namespace) -> dict[str, float]:
    samples, words = asked(DATA, "test", TASK, args.limit), WordBall("l2", args.text_eps)
    kinds: dict[str, Any] = {"image": {}, "text": {"words": words, "images": False}, "both": {"words": words}}
    found: dict[str, list[float]] = {name: [] for name in ("clean", *kinds)}
    for start in track(range(0, len(samples), 64), "attacks"):
        batch = pipeline.on_device(pipeline.collate(samples[start : start + 64]))
        for kind, settings in kinds.items():
            victim = victim_of(pipeline, batch)
            victim.heads = victim.scorer = None
            ball = ThreatModel("linf", args.eps)
            look = verdicts(victim, ball, args.attack_steps, seed=0, sample_ids=batch["sample_ids"], **settings)
            found[kind] += look["robust_accuracy"].tolist()
        found["clean"] += look["accuracy"].tolist()
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="easyvqa-llava-immune")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=ROWS)
    parser.add_argument("--eps", type=parse_eps, default=16 / 255)
    parser.add_argument("--text-eps", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--attack-steps", type=int, default=50)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/modality"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    names = ("model", "eps", "text_eps", "steps", "learning_rate", "attack_steps", "limit", "seed")
    settings = {name: getattr(args, name) for name in names} | {"batch_size": 32, "inner": "bridge, K = 4, R = 1"}
    if {k: v for k, v in results.get("settings", settings).items() if k != "versions"} != settings:
        raise SystemExit(f"{args.out} holds rows of other settings; name another --out")
    for row in args.rows:
        if row in results:
            continue
        pipeline = Pipeline.load(args.model, heads=None)
        training = trained(pipeline, row, args) if row != "none" else None
        results[row] = {"training": training, "robust_accuracy": attacked(pipeline, args)}
        results["settings"] = settings | {"versions": versions()}
        write_results(results, args.out)
        print(row, json.dumps(results[row]), flush=True)


if __name__ == "__main__":
    main()
