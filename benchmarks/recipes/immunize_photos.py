"""Immunises `photo-dual-encoder` over three seeds on clip art, and measures retrieval under attack.

    python benchmarks/recipes/immunize_photos.py --pictures runs/clip-art --coco coco_val2017 --work runs/photos \\
        --out benchmarks/results/photos/immunised.json

`--pictures` is what clip_art.py makes: its split `train` is trained on, its split `test` measured. `--coco` holds
captions_val2017.json and its pictures (`docs/formats.md`), which are only measured; it may be left out. Training is
that of `cmai-fast immunize --defence fgsm-rs --trainable vision --task retrieval`, without its report. Seeds and
measurements that are done are kept in `--work`, and an interrupted run resumes when it is repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.versions import versions
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel, parse_eps
from cmai_fast.workflows import training
from cmai_fast.workflows.samples import asked
from cmai_fast.workflows.settings import ImmunizeSettings

MODEL = "photo-dual-encoder"


def trained(args: argparse.Namespace, seed: int) -> Path:
    """The model of a seed, trained now if it is not there."""
    folder = args.work / f"seed-{seed}"
    if not (folder / "training.json").is_file():
        settings = ImmunizeSettings(
            model=MODEL, data=str(args.pictures), split_seed=0, task="retrieval", defence="fgsm-rs", trainable="vision",
            eps=args.eps, max_steps=args.steps, batch_size=args.batch_size,
            learning_rate=args.lr, seed=seed, save_steps=50, device="cpu",
        )  # fmt: skip
        record = training.train(training.load(settings, MODEL), None, settings, folder, True)
        write_results(record, folder / "training.json")
    return folder / "model"


def measured(args: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """R@K of a model on each data set, clean and under PGD, from `--work` if it is there."""
    sources = {"clip art": DataSource(str(args.pictures), split_seed=0)}
    if args.coco:
        sources["coco"] = DataSource(f"coco-captions:{args.coco}", split="val2017")
    return {data: _measured(args, f"{name}-{data}", model, source) for data, source in sources.items()}


def _measured(args: argparse.Namespace, name: str, model: str, source: DataSource) -> dict[str, Any]:
    file = args.work / f"{name}-{round(args.test_eps * 255)}-pgd-{args.attack_steps}.json"
    if not file.is_file():
        samples = asked(source, "test", "retrieval", None)
        pipeline = Pipeline.load(model, device="cpu")
        pipeline.choose_from(samples)
        suite = [AttackSpec("pgd", args.attack_steps)]
        found = measure(pipeline, samples, ThreatModel("linf", args.test_eps), suite, task="retrieval").record
        kept = {k: found[k] for k in ("n", "acc_clean", "acc_robust", "asr", "metrics", "attacks") if k in found}
        write_results({**kept, "sample_ids": [s.id for s in samples]}, file)
    return json.loads(file.read_text(encoding="utf-8"))


def summary(records: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """[mean, standard deviation] of each R@K of one data set over the seeds, clean and robust."""
    return {
        side: {
            name: [f([r["metrics"][side][name] for r in records]) for f in (statistics.mean, statistics.stdev)]
            for name in records[0]["metrics"][side]
        }
        for side in ("clean", "robust")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eps", type=parse_eps, default="2/255", help="of training")
    parser.add_argument("--test-eps", type=parse_eps, default="2/255", help="of the attacks")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--attack-steps", type=int, default=5, help="of PGD, in measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    undefended = measured(args, "undefended", MODEL)
    immunised = []
    for seed in args.seeds:
        immunised.append(measured(args, f"seed-{seed}", str(trained(args, seed))))
        print(f"seed {seed}", {data: found["metrics"] for data, found in immunised[-1].items()}, flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("pictures", "coco", "work", "out")}
    record = {
        "recipe": "benchmarks/recipes/immunize_photos.py",
        "settings": {**settings, "defence": "fgsm-rs", "trainable": "vision", "image_size": 128},
        "undefended": undefended,
        "immunised": [{"seed": s, **r} for s, r in zip(args.seeds, immunised, strict=True)],
        "versions": versions(),
    }
    if len(immunised) > 1:
        record["mean_and_sd"] = {data: summary([r[data] for r in immunised]) for data in immunised[0]}
    write_results(record, args.out)


if __name__ == "__main__":
    main()
