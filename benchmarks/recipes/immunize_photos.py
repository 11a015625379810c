"""Immunises `photo-dual-encoder` over three seeds without labels, and measures retrieval on photos under attack.

    python benchmarks/recipes/immunize_photos.py --pictures runs/scenes --coco coco_val2017 --work runs/photos \\
        --out benchmarks/results/photos/immunised.json

`--pictures` is what scenes.py makes; only its split `train` is used, and its captions are not read. `--coco` holds
captions_val2017.json and its pictures (`docs/formats.md`), which are only measured. Training is that of `cmai-fast
immunize --defence fare --inner fgsm --task retrieval`, without its report; a measurement is what `cmai-fast evaluate
--data coco-captions:coco_val2017 --split val2017 --task retrieval --attack ...` reports, with these attacks alone.
Checkpoints, models and measurements are kept in `--work`, so an interrupted run resumes when it is repeated.
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


def settings_of(args: argparse.Namespace, seed: int) -> ImmunizeSettings:
    return ImmunizeSettings(
        model=MODEL, data=str(args.pictures), split_seed=0, task="retrieval", defence="fare", inner="fgsm",
        eps=args.eps, max_steps=args.steps, batch_size=args.batch_size, learning_rate=args.lr, seed=seed,
        save_steps=20, device="cpu",
    )  # fmt: skip


def trained(args: argparse.Namespace, seed: int) -> str:
    """The folder of the model of a seed, trained now if it is not there."""
    folder, settings = args.work / f"seed-{seed}", settings_of(args, seed)
    if not (folder / "training.json").is_file():
        record = training.train(training.load(settings, MODEL), None, settings, folder, True)
        write_results(record, folder / "training.json")
    return str(folder / "model")


def measured(args: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """By radius: R@K of a model on the photos, clean and under PGD and APGD, from `--work` if it is there."""
    found = {}
    for eps in args.test_eps:
        radius = f"{eps * 255:.3g}"
        file = args.work / f"{name}-{radius}.json"
        if not file.is_file():
            samples = asked(DataSource(f"coco-captions:{args.coco}", split="val2017"), "test", "retrieval", None)
            suite = [AttackSpec("pgd", args.attack_steps), AttackSpec("apgd", 2 * args.attack_steps)]
            pipeline = Pipeline.load(model, device="cpu")
            record = measure(pipeline, samples, ThreatModel("linf", eps), suite, task="retrieval").record
            kept = ("n", "acc_clean", "acc_robust", "asr", "metrics", "attacks")
            write_results({k: record[k] for k in kept}, file)
        found[f"{radius}/255"] = json.loads(file.read_text(encoding="utf-8"))
    return found


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
    parser.add_argument("--eps", type=parse_eps, default="1/255", help="of training")
    parser.add_argument("--test-eps", type=parse_eps, nargs="+", default=[1 / 255, 2 / 255], help="of the attacks")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--attack-steps", type=int, default=10, help="of PGD in measurements; APGD takes twice as many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-only", action="store_true", help="measure and write nothing")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {f"seed-{seed}-coco": trained(args, seed) for seed in args.seeds}
    if args.train_only:
        return
    undefended = measured(args, "undefended-coco", MODEL)
    immunised = [measured(args, name, model) for name, model in models.items()]
    training_settings = settings_of(args, 0)
    record = {
        "recipe": "benchmarks/recipes/immunize_photos.py",
        "settings": {
            **{k: getattr(training_settings, k) for k in ("defence", "inner", "eps", "max_steps", "batch_size")},
            "learning_rate": args.lr, "pictures": "scenes.py, split train", "image_size": 128,
            "attacks": f"PGD-{args.attack_steps} and APGD-CE-{2 * args.attack_steps}", "threads": args.threads,
        },
        "undefended": undefended,
        "immunised": [{"seed": seed, **found} for seed, found in zip(args.seeds, immunised, strict=True)],
        "versions": versions(),
    }  # fmt: skip
    if len(immunised) > 1:
        record["mean_and_sd"] = {radius: summary([r[radius] for r in immunised]) for radius in undefended}
    write_results(record, args.out)


if __name__ == "__main__":
    main()
