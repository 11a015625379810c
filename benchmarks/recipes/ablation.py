"""The ablation: what each part of CMAI adds to robustness, all runs given the same training time, several seeds.

    python benchmarks/recipes/ablation.py time                     # on an idle machine: seconds of a step of each row
    python benchmarks/recipes/ablation.py run --seeds 0 1 2         # hours; resumes, and skips what is there
    python benchmarks/recipes/ablation.py adaptive --only full      # the guard of each finished run, attacked
    python benchmarks/recipes/ablation.py table

Every row starts from the undefended `easyvqa-llava` and trains for as many steps as fit into `--seconds` by
times.json (a verifier that is fitted first counts too). The suite is that of the headline results: PGD-50 with two
restarts and APGD-CE-100; a question is robust if its answer stays right under both. `run` writes one JSON file per row
and seed, so several processes may share the work by `--only`. `adaptive` attacks the verifier that a run has trained,
at the threshold that rejects 5% of clean inputs, and adds what is wrong and accepted to the file of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from full_strength import DATA, TASK, claim, evaluate

from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.evaluation.overhead import stepper
from cmai_fast.evaluation.progress import Overall
from cmai_fast.evaluation.protocol import measure, stages
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_text
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel, parse_eps
from cmai_fast.workflows.samples import asked, training_batches, training_samples
from cmai_fast.workflows.settings import ImmunizeSettings
from cmai_fast.workflows.training import fitted, needs_consistency, train, training_arguments

BASE = ImmunizeSettings(
    defence="mbat", learning_rate=1e-3, muon=True, batch_size=32, inner_steps=4, refreshes=1, beta=0.0, gamma=0.0,
    arm=False, save_steps=500,
)  # fmt: skip
CMCV = {"gamma": 1.0, "beta": 1.0}
ALONE = {"consistency_steps": 5, "learning_rate": 2e-3}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mbat": ("MBAT alone: beta = gamma = 0, no ARM", {}),
    "mbat-2e-3": ("the same, learning rate 2e-3", {"learning_rate": 2e-3}),
    "gamma": ("with S_c in the loss (gamma = 1)", {"gamma": 1.0}),
    "cmcv": ("with S_c in loss and attack (gamma = beta = 1)", CMCV),
    "alone": ("with S_c in the loss, and 5 steps of 6 on S_c alone", {"gamma": 1.0, **ALONE}),
    "cmcv-alone": ("with S_c in loss and attack, and 5 steps of 6 on S_c alone", {**CMCV, **ALONE}),
    "full": ("full CMAI: the same with ARM, which moves beta from 0.1", {**CMCV, **ALONE, "beta": 0.1, "arm": True}),
}


def settings_of(row: str, eps: float, seed: int, seconds: float, times: dict[str, float]) -> ImmunizeSettings:
    settings = replace(BASE, eps=eps, seed=seed, **ROWS[row][1])
    fit = times["fit"] if needs_consistency(settings) else 0.0
    return replace(settings, max_steps=max(1, round((seconds - fit) / times[row])))


def measure_time(args: argparse.Namespace) -> None:
    """Seconds of a step of each row, alternating in one process: the mean over a full step and those on S_c alone that
    follow it, medians over rounds; and of fitting the verifier."""
    subject = Pipeline.load(BASE.model)
    subject.heads = subject.verifier = subject.threshold = None
    start = time.perf_counter()
    verifier = fitted(subject, replace(BASE, gamma=1.0))
    fit = time.perf_counter() - start
    assert isinstance(verifier, Verifier)
    samples, runs = training_samples(DATA, TASK), {}
    for row in args.only or ROWS:
        settings = settings_of(row, args.eps, 0, 1.0, {row: 1.0, "fit": 0.0})
        arguments = training_arguments(settings, args.work)
        statements = verifier.statements if needs_consistency(settings) else None
        batches = training_batches(subject, samples, BASE.batch_size, 0, statements)
        runs[row] = settings, batches, stepper(subject, arguments, {}, verifier)[1]
    record = alternating(
        {row: (k.consistency_steps + 1, lambda b=b: next(b), step) for row, (k, b, step) in runs.items()}, args.rounds
    ) | {"fit": fit}
    write_results({"seconds_a_step": record, "rounds": args.rounds, "versions": versions()}, args.out / "times.json")
    print(json.dumps(record, indent=2))


def alternating(runs: dict[str, tuple[int, Callable[[], Any], Callable[[Any], None]]], rounds: int) -> dict[str, float]:
    """Seconds of a step of each, from (steps that repeat, what gives a batch, the step): means over the steps that
    repeat, medians over rounds; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, (steps, batch, step) in runs.items():
            start = time.perf_counter()
            for _ in range(steps):
                step(batch())
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def run(args: argparse.Namespace) -> None:
    times = json.loads((args.out / "times.json").read_text())["seconds_a_step"]
    for seed in args.seeds:
        for row in args.only or ROWS:
            path = args.out / "runs" / f"{row}-seed{seed}.json"
            if path.exists():
                continue
            print(f"== {row}, seed {seed}", flush=True)
            settings = settings_of(row, args.eps, seed, args.seconds, times)
            record = one(settings, args.work / f"{row}-seed{seed}", args)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_results(record | {"row": row, "title": ROWS[row][0], "seed": seed, "versions": versions()}, path)


def one(settings: ImmunizeSettings, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    claim(work, settings)
    if not (work / "trained.json").exists():
        subject, start = Pipeline.load(settings.model), time.process_time()
        verifier = fitted(subject, settings) if needs_consistency(settings) else None
        with Overall({"training": 1.0, "calibration": 0.1}) as progress:
            trained = train(subject, verifier, settings, work, True, progress)
        write_results(trained | {"cpu_seconds": time.process_time() - start}, work / "trained.json")
    trained = json.loads((work / "trained.json").read_text())
    record = evaluate(Pipeline.load(str(work / "model")), args.eps, args.limit)
    kept = ("acc_clean", "acc_clean_whole_test_split", "acc_robust", "asr", "n", "attacks", "detection")
    curves = {k: trained[k] for k in ("seconds", "cpu_seconds", "passes", "resumed")}
    return {k: record[k] for k in kept if k in record} | {"training": curves, "settings": asdict(settings)}


def adaptive(args: argparse.Namespace) -> None:
    """The adaptive attack (100 steps, 2 targets) on the runs that have a verifier and whose model is still there."""
    suite = (AttackSpec("adaptive", 100, args.restarts),)
    for seed in args.seeds:
        for row in args.only or ROWS:
            path, model = args.out / "runs" / f"{row}-seed{seed}.json", args.work / f"{row}-seed{seed}" / "model"
            if not path.exists() or not model.exists():
                continue
            record, subject = json.loads(path.read_text()), Pipeline.load(str(model))
            if "adaptive" in record or subject.verifier is None:
                continue
            subject.name = path.stem
            samples, threat = asked(DATA, "test", TASK, args.limit), ThreatModel("linf", args.eps)
            with Overall(stages(path.stem, len(samples), threat, suite, None, False)) as progress:
                found = measure(subject, samples, threat, suite, batch_size=64, progress=progress).record
            kept = {key: found[key] for key in ("acc_robust", "attacks", "detection")}
            write_results(record | {"adaptive": kept | {"versions": versions()}}, path)


def table(args: argparse.Namespace) -> None:
    times = json.loads((args.out / "times.json").read_text())["seconds_a_step"]
    found = [json.loads(p.read_text()) for p in sorted((args.out / "runs").glob("*.json"))]
    lines = [
        "| Row | Seeds | Clean | Robust | ASR | Wrong and accepted | the same, adaptive | Steps | Seconds per step |",
        "|" + "---|" * 9,
    ]
    for row, (title, _) in ROWS.items():
        if mine := [r for r in found if r["row"] == row]:
            shares = [share([r[key] for r in mine]) for key in ("acc_clean_whole_test_split", "acc_robust", "asr")]
            guards = [
                [r["detection"] for r in mine if r.get("detection")],
                [r["adaptive"]["detection"] for r in mine if "adaptive" in r],
            ]
            shares += [share([d["fooled_and_accepted"] for d in guard]) if guard else "" for guard in guards]
            cells = [title, str(len(mine)), *shares, str(mine[0]["settings"]["max_steps"]), f"{times[row]:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    write_text("\n".join(lines) + "\n", args.out / "table.md")
    print("\n".join(lines))


def share(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "adaptive", "table"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation"))
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="checkpoints and trained models")
    parser.add_argument("--eps", type=parse_eps, default=16 / 255)
    parser.add_argument("--seconds", type=float, default=400.0, help="of training, by times.json")
    parser.add_argument("--only", nargs="*", choices=tuple(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=500, help="test questions attacked")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of time")
    parser.add_argument("--restarts", type=int, default=1, help="of the adaptive attack")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"run": run, "time": measure_time, "adaptive": adaptive, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
