"""The frontier: what each way to train reaches in robust accuracy, for the time that it takes.

    python benchmarks/recipes/frontier.py time                              # on an idle machine: seconds of a step
    python benchmarks/recipes/frontier.py run --steps 500 --seeds 0 1 2      # equal steps; resumes, skips what is there
    python benchmarks/recipes/frontier.py run --seconds 420 --seeds 0 1 2    # equal time, by times.json
    python benchmarks/recipes/frontier.py table                             # and the plot

Every row starts from the undefended `easyvqa-llava`. The suite is that of the headline results: PGD-50 with two
restarts and APGD-CE-100; a question is robust if its answer stays right under both. `run` writes one JSON file per row,
budget and seed, so several processes may share the work by `--only` or `--share`. Times are those of one CPU thread
wherever the runs themselves take place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablation import CMCV, one
from full_strength import DATA, TASK

from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.defences import defence
from cmai_fast.evaluation.overhead import stepper
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import parse_eps
from cmai_fast.workflows.samples import training_batches, training_samples
from cmai_fast.workflows.settings import ImmunizeSettings
from cmai_fast.workflows.training import fitted, needs_consistency, training_arguments

BASE = ImmunizeSettings(learning_rate=1e-3, muon=True, save_steps=1_000_000)
PLAIN = {"beta": 0.0, "gamma": 0.0, "arm": False}
FEATURES = {**PLAIN, "inner": "pgd", "trainable": "vision", "lam": 1.0}
BRIDGE = {**PLAIN, "inner": "bridge"}
ALONE = {**CMCV, "beta": 0.0, "arm": False, "inner": "bridge", "inner_steps": 4, "consistency_steps": 5}
HALF, FAST = {"batch_size": 32}, {"learning_rate": 2e-3}
# What of a row belongs to the settings of a run; the rest are values of `MBATConfig`.
OF_RUN = ("batch_size", "learning_rate")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "pgd-10": ("exact PGD, K = 10", {**PLAIN, "inner": "pgd"}),
    "pgd-5": ("exact PGD, K = 5", {**PLAIN, "inner": "pgd", "inner_steps": 5}),
    "pgd-3": ("exact PGD, K = 3", {**PLAIN, "inner": "pgd", "inner_steps": 3}),
    "pgd-2": ("exact PGD, K = 2", {**PLAIN, "inner": "pgd", "inner_steps": 2}),
    "fgsm-rs": ("one step from a random start", {**PLAIN, "inner": "fgsm"}),
    "bridge-r0": ("bridge, R = 0, K = 10", BRIDGE),
    "bridge-r0-k5": ("bridge, R = 0, K = 5", {**BRIDGE, "inner_steps": 5}),
    "bridge-r1": ("bridge, R = 1, K = 10", {**BRIDGE, "refreshes": 1}),
    "bridge-r1-k5": ("bridge, R = 1, K = 5", {**BRIDGE, "refreshes": 1, "inner_steps": 5}),
    "bridge-r2": ("bridge, R = 2, K = 10", {**BRIDGE, "refreshes": 2}),
    "half-pgd-10": ("exact PGD, K = 10, batches of 32", {**PLAIN, "inner": "pgd", **HALF}),
    "half-r0": ("bridge, R = 0, K = 10, batches of 32", {**BRIDGE, **HALF}),
    "half-r1": ("bridge, R = 1, K = 10, batches of 32", {**BRIDGE, "refreshes": 1, **HALF}),
    "fare": ("FARE (image side alone), K = 10", {**FEATURES, "objective": "fare"}),
    "fare-2e-3": ("FARE, learning rate 2e-3", {**FEATURES, "objective": "fare", **FAST}),
    "sim-clip": ("Sim-CLIP (image side alone), K = 10", {**FEATURES, "objective": "sim-clip"}),
    "bridge-r0-2e-3": ("bridge, R = 0, K = 10, learning rate 2e-3", {**BRIDGE, **FAST}),
    "half-r0-2e-3": ("bridge, R = 0, K = 10, batches of 32, learning rate 2e-3", {**BRIDGE, **HALF, **FAST}),
    "pgd-10-2e-3": ("exact PGD, K = 10, learning rate 2e-3", {**PLAIN, "inner": "pgd", **FAST}),
    "alone-r0": ("S_c in the loss, 5 steps of 6 on S_c alone, R = 0, K = 4", {**ALONE, **HALF, **FAST}),
    "alone-r1": ("the same, R = 1", {**ALONE, "refreshes": 1, **HALF, **FAST}),
    "alone-r1-64": ("the same, R = 1, batches of 64", {**ALONE, "refreshes": 1, **FAST}),
    "alone-r0-64": ("the same, R = 0, batches of 64", {**ALONE, **FAST}),
    "alone-r0-beta": ("the same, R = 0, S_c in the attack too (beta = 1)", {**ALONE, "beta": 1.0, **HALF, **FAST}),
    "alone-r0-arm": (
        "the same with ARM, which moves beta from 0.1",
        {**ALONE, "beta": 0.1, "arm": True, **HALF, **FAST},
    ),
    "alone-r0-11": ("R = 0, 11 steps of 12 on S_c alone", {**ALONE, "consistency_steps": 11, **HALF, **FAST}),
    "alone-r0-2": ("R = 0, 2 steps of 3 on S_c alone", {**ALONE, "consistency_steps": 2, **HALF, **FAST}),
    "gamma-r0": ("S_c in the loss, no step on it alone, R = 0", {**ALONE, "consistency_steps": 0, **HALF, **FAST}),
    "alone-r1-k10": ("the same, R = 1, K = 10", {**ALONE, "refreshes": 1, "inner_steps": 10, **HALF, **FAST}),
}
for _row, (_title, _values) in ROWS.items():
    defence(f"frontier-{_row}", _title, **{k: v for k, v in _values.items() if k not in OF_RUN})


def settings_of(row: str, eps: float, seed: int, steps: int) -> ImmunizeSettings:
    own = {k: v for k, v in ROWS[row][1].items() if k in OF_RUN}
    return replace(BASE, defence=f"frontier-{row}", eps=eps, seed=seed, max_steps=steps, **own)


def steps_within(row: str, seconds: float, times: dict[str, float]) -> int:
    """Optimizer steps that fit into these seconds of one CPU thread, beside fitting a verifier where one is needed."""
    fit = times["fit"] if needs_consistency(settings_of(row, 16 / 255, 0, 1)) else 0.0
    return max(1, round((seconds - fit) / times[row]))


def measure_time(args: argparse.Namespace) -> None:
    """Seconds of a step of each row, alternating in one process: the mean over a full step and those on S_c alone that
    follow it, medians over rounds; and of fitting the verifier."""
    subject = Pipeline.load(BASE.model)
    subject.heads = subject.verifier = subject.threshold = None
    start = time.perf_counter()
    verifier = fitted(subject, settings_of("alone-r0", args.eps, 0, 1))
    fit = time.perf_counter() - start
    assert isinstance(verifier, Verifier)
    samples, runs = training_samples(DATA, TASK), {}
    for row in args.only or ROWS:
        settings = settings_of(row, args.eps, 0, 1)
        arguments = training_arguments(settings, args.work)
        heads = verifier if needs_consistency(settings) else None
        batch = next(training_batches(subject, samples, settings.batch_size, 0, heads and heads.statements))
        runs[row] = arguments.consistency_steps + 1, batch, stepper(subject, arguments, {}, heads)[1]
    seconds: dict[str, list[float]] = {row: [] for row in runs}
    for _ in range(args.rounds + 1):
        for row, (steps, batch, step) in runs.items():
            start = time.perf_counter()
            for _ in range(steps):
                step(batch)
            seconds[row].append((time.perf_counter() - start) / steps)
    path = args.out / "times.json"
    record = json.loads(path.read_text())["seconds_a_step"] if path.exists() else {}
    record |= {row: statistics.median(values[1:]) for row, values in seconds.items()} | {"fit": fit}
    write_results({"seconds_a_step": record, "rounds": args.rounds, "versions": versions()}, path)
    print(json.dumps(record, indent=2))


def run(args: argparse.Namespace) -> None:
    times = json.loads((args.out / "times.json").read_text())["seconds_a_step"]
    budget = f"{args.steps}-steps" if args.steps else f"{args.seconds:g}-s"
    jobs = [(row, seed) for seed in args.seeds for row in args.only or ROWS]
    for row, seed in jobs[args.share[0] :: args.share[1]]:
        name = f"{row}-{budget}-seed{seed}"
        path = args.out / "runs" / f"{name}.json"
        if path.exists():
            continue
        steps = args.steps or steps_within(row, args.seconds, times)
        print(f"== {name}: {steps} steps", flush=True)
        record = one(settings_of(row, args.eps, seed, steps), args.work / name, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        budgets = {"budget": budget, "seconds_by_cpu": steps * times[row]}
        write_results(
            record | {"row": row, "title": ROWS[row][0], "seed": seed} | budgets | {"versions": versions()}, path
        )


def table(args: argparse.Namespace) -> None:
    found = [json.loads(p.read_text()) for p in sorted((args.out / "runs").glob("*.json"))]
    for r in sorted(found, key=lambda r: (r["budget"], -r["acc_robust"])):
        print(r["budget"], r["row"], r["seed"], f"{r['acc_clean_whole_test_split']:.1%} {r['acc_robust']:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "table"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frontier"))
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="checkpoints and trained models")
    parser.add_argument("--eps", type=parse_eps, default=16 / 255)
    parser.add_argument("--steps", type=int, help="as many optimizer steps for each row")
    parser.add_argument("--seconds", type=float, default=420.0, help="without --steps: of training, by times.json")
    parser.add_argument("--only", nargs="*", choices=tuple(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="the I-th of N parts")
    parser.add_argument("--limit", type=int, default=500, help="test questions attacked")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"run": run, "time": measure_time, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
