"""Immunises `photo-dual-encoder` over three seeds on clip art, and measures retrieval on COCO photos under attack.

    python benchmarks/recipes/immunize_photos.py --pictures runs/clip-art --coco coco_val2017 --work runs/photos \\
        --out benchmarks/results/photos/retrieval.json

`--pictures` is what clip_art.py makes; `--coco` holds captions_val2017.json and its pictures (`docs/formats.md`), which
are measured alone: nothing is trained or chosen on them. Training is that of `cmai-fast immunize --defence pgd-at
--trainable vision --task retrieval`, without the report on clip art. Seeds and measurements that are done are kept in
`--work`, and an interrupted run resumes when it is repeated.
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
            model=MODEL, data=str(args.pictures), split_seed=0, task="retrieval", defence="pgd-at", trainable="vision",
            eps=args.eps, inner_steps=args.inner_steps, max_steps=args.steps, batch_size=args.batch_size,
            learning_rate=args.lr, seed=seed, save_steps=50, device="cpu",
        )  # fmt: skip
        record = training.train(training.load(settings, MODEL), None, settings, folder, True)
        write_results(record, folder / "training.json")
    return folder / "model"


def measured(args: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """R@K of a model, clean and under the suite, from `--work` if it is there."""
    file = args.work / f"{name}-{round(args.test_eps * 255)}-pgd-{args.attack_steps}.json"
    if not file.is_file():
        samples = asked(DataSource(f"coco-captions:{args.coco}", split="val2017"), "test", "retrieval", None)
        pipeline = Pipeline.load(model, device="cpu")
        pipeline.choose_from(samples)
        suite = [AttackSpec("pgd", args.attack_steps)]
        found = measure(pipeline, samples, ThreatModel("linf", args.test_eps), suite, task="retrieval").record
        kept = {k: found[k] for k in ("n", "acc_clean", "acc_robust", "asr", "metrics", "attacks") if k in found}
        write_results({**kept, "sample_ids": [s.id for s in samples]}, file)
    return json.loads(file.read_text(encoding="utf-8"))


def summary(records: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """[mean, standard deviation] of each R@K over the seeds, clean and robust."""
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
    parser.add_argument("--coco", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eps", type=parse_eps, default="2/255", help="of training")
    parser.add_argument("--test-eps", type=parse_eps, default="1/255", help="of the attacks")
    parser.add_argument("--inner-steps", type=int, default=2, help="of PGD in training")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--attack-steps", type=int, default=10, help="of PGD, in measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    undefended = measured(args, "undefended", MODEL)
    print("undefended", json.dumps(undefended["metrics"]), flush=True)
    immunised = []
    for seed in args.seeds:
        immunised.append(measured(args, f"seed-{seed}", str(trained(args, seed))))
        print(f"seed {seed}", json.dumps(immunised[-1]["metrics"]), flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("pictures", "coco", "work", "out")}
    record = {
        "recipe": "benchmarks/recipes/immunize_photos.py",
        "settings": {**settings, "defence": "pgd-at", "trainable": "vision", "image_size": 128},
        "data": "coco-captions, val2017: 85 photos, 425 captions",
        "undefended": undefended,
        "immunised": [{"seed": s, **r} for s, r in zip(args.seeds, immunised, strict=True)],
        "versions": versions(),
    }
    if len(immunised) > 1:
        record["mean_and_sd"] = summary(immunised)
    write_results(record, args.out)


if __name__ == "__main__":
    main()
