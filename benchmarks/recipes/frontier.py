"""The frontier: what each way to train reaches in robust accuracy, for the time that it takes.

    python benchmarks/recipes/frontier.py time                              # on an idle machine: seconds of a step
    python benchmarks/recipes/frontier.py run --steps 500 --seeds 0 1 2      # equal steps; resumes, skips what is there
    python benchmarks/recipes/frontier.py run --seconds 420 --seeds 0 1 2    # equal time, by times.json
    python benchmarks/recipes/frontier.py table                             # and the plot

    python benchmarks/recipes/deepen_language.py --layers 24 --out runs/deep/model   # a model of a deep language side
    python benchmarks/recipes/frontier.py run --model runs/deep/model --out benchmarks/results/frontier-deep ...

Every row starts from the undefended `easyvqa-llava`, or from `--model`. The suite is that of the headline results:
PGD-50 with two restarts and APGD-CE-100; a question is robust if its answer stays right under both. `run` writes one
JSON file per row, budget and seed, so several processes may share the work by `--only` or `--share`. Times are those of
one CPU thread wherever the runs themselves take place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from ablation import CMCV, alternating, one, share
from full_strength import DATA, TASK
from one_pass import NFGSM, Free

from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data.easyvqa import SPLITS, EasyVQA
from cmai_fast.data.formats import FORMATS
from cmai_fast.data.formats.format import data_format
from cmai_fast.defences import DEFENCES, defence
from cmai_fast.evaluation import overhead
from cmai_fast.evaluation.overhead import stepper
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.files import write_text
from cmai_fast.mbat import MBATTrainer
from cmai_fast.pipeline import Pipeline
from cmai_fast.report.charts import Axis, Line, line_chart
from cmai_fast.threat import parse_eps
from cmai_fast.workflows import training
from cmai_fast.workflows.samples import training_batches, training_samples
from cmai_fast.workflows.settings import ImmunizeSettings
from cmai_fast.workflows.training import fitted, needs_consistency, training_arguments

BASE = ImmunizeSettings(learning_rate=1e-3, muon=True, save_steps=1_000_000)
PLAIN = {"beta": 0.0, "gamma": 0.0, "arm": False}
FEATURES = {**PLAIN, "inner": "pgd", "trainable": "vision", "lam": 1.0}
BRIDGE = {**PLAIN, "inner": "bridge"}
ALONE = {**CMCV, "beta": 0.0, "arm": False, "inner": "bridge", "inner_steps": 4, "consistency_steps": 5}
CMAI = {**ALONE, "anchor": 1.0}
HALF, FAST = {"batch_size": 32}, {"learning_rate": 2e-3}
ONE = {"data": "easyvqa-one"}
# What of a row belongs to the settings of a run; the rest are values of `MBATConfig`.
OF_RUN = ("batch_size", "learning_rate", "data")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "pgd-10": ("exact PGD, K = 10", {**PLAIN, "inner": "pgd"}),
    "pgd-5": ("exact PGD, K = 5", {**PLAIN, "inner": "pgd", "inner_steps": 5}),
    "pgd-3": ("exact PGD, K = 3", {**PLAIN, "inner": "pgd", "inner_steps": 3}),
    "pgd-2": ("exact PGD, K = 2", {**PLAIN, "inner": "pgd", "inner_steps": 2}),
    "fgsm-rs": ("one step from a random start", {**PLAIN, "inner": "fgsm"}),
    "n-fgsm": ("N-FGSM, one step from noise of 2 eps", {**PLAIN, "inner": "fgsm"}),
    "free": ("Free, each batch 4 times", {**PLAIN, "inner": "fgsm", "lam": 1.0}),
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
    "cmai": ("CMAI: S_c in the loss, 5 steps of 6 on S_c alone, anchored, R = 0, K = 4", {**CMAI, **HALF, **FAST}),
    "cmai-one": ("CMAI, on one question of each picture", {**CMAI, **HALF, **FAST, **ONE}),
    "cmai-vision": ("CMAI, the vision side alone learns", {**CMAI, "trainable": "vision", **HALF, **FAST}),
    "cmai-11": ("CMAI, 11 steps of 12 on S_c alone", {**CMAI, "consistency_steps": 11, **HALF, **FAST}),
    "alone-r0": ("CMAI without the anchor", {**ALONE, **HALF, **FAST}),
    "alone-r1": ("CMAI without the anchor, R = 1", {**ALONE, "refreshes": 1, **HALF, **FAST}),
    "alone-r1-64": ("CMAI without the anchor, R = 1, batches of 64", {**ALONE, "refreshes": 1, **FAST}),
    "alone-r0-64": ("CMAI without the anchor, batches of 64", {**ALONE, **FAST}),
    "alone-r0-beta": (
        "CMAI without the anchor, S_c in the attack too (beta = 1)",
        {**ALONE, "beta": 1.0, **HALF, **FAST},
    ),
    "alone-r0-arm": (
        "CMAI without the anchor, with ARM, which moves beta from 0.1",
        {**ALONE, "beta": 0.1, "arm": True, **HALF, **FAST},
    ),
    "alone-r0-11": (
        "CMAI without the anchor, 11 steps of 12 on S_c alone",
        {**ALONE, "consistency_steps": 11, **HALF, **FAST},
    ),
    "alone-r0-2": (
        "CMAI without the anchor, 2 steps of 3 on S_c alone",
        {**ALONE, "consistency_steps": 2, **HALF, **FAST},
    ),
    "gamma-r0": ("S_c in the loss, no step on it alone, R = 0", {**ALONE, "consistency_steps": 0, **HALF, **FAST}),
    "alone-r0-k2": ("CMAI without the anchor, K = 2", {**ALONE, "inner_steps": 2, **HALF, **FAST}),
    "alone-r0-vision": (
        "CMAI without the anchor, the vision side alone learns",
        {**ALONE, "trainable": "vision", **HALF, **FAST},
    ),
    "alone-r0-one": ("CMAI without the anchor, on one question of each picture", {**ALONE, **HALF, **FAST, **ONE}),
    "half-r0-one": ("bridge, R = 0, K = 10, on one question of each picture", {**BRIDGE, **HALF, **ONE}),
    "alone-r1-k10": (
        "CMAI without the anchor, R = 1, K = 10",
        {**ALONE, "refreshes": 1, "inner_steps": 10, **HALF, **FAST},
    ),
}

TRAINERS: dict[str, type[MBATTrainer]] = {"n-fgsm": NFGSM, "free": Free}  # of rows that are no solver of the package


class OneQuestion(EasyVQA):
    """easy-VQA with one question of each picture, drawn once; of the test split, all."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        if split != "test":
            shuffled = np.random.default_rng(0).permutation(self.sample_ids).tolist()
            self.sample_ids = sorted({self.image_ids[i]: i for i in shuffled}.values())


def settings_of(row: str, eps: float, seed: int, steps: int, model: str = BASE.model) -> ImmunizeSettings:
    title, values = ROWS[row]
    own = {k: v for k, v in values.items() if k in OF_RUN}
    if own.get("data") == ONE["data"] and ONE["data"] not in FORMATS.names():
        named = data_format(ONE["data"], takes="", splits=lambda place: SPLITS, fingerprint=lambda place: ONE["data"])
        named(lambda place, split, fields: OneQuestion(split))
    if (name := f"frontier-{row}") not in DEFENCES.names():
        defence(name, title, **{k: v for k, v in values.items() if k not in OF_RUN})
    return replace(BASE, model=model, defence=name, eps=eps, seed=seed, max_steps=steps, **own)


@contextmanager
def trained_by(row: str) -> Iterator[None]:
    """Inside, models are trained by the trainer of this row."""
    kind = TRAINERS.get(row, MBATTrainer)
    with mock.patch.object(training, "MBATTrainer", kind), mock.patch.object(overhead, "MBATTrainer", kind):
        yield


def steps_within(row: str, seconds: float, times: dict[str, float]) -> int:
    """Optimizer steps that fit into these seconds of one CPU thread, beside fitting a verifier where one is needed."""
    fit = times["fit"] if needs_consistency(settings_of(row, 16 / 255, 0, 1)) else 0.0
    return max(1, round((seconds - fit) / step_time(row, times)))


def step_time(row: str, times: dict[str, float]) -> float:
    return times[row.removesuffix("-one")]  # the same step on other questions


def measure_time(args: argparse.Namespace) -> None:
    """Seconds of a step of each row, alternating in one process: the mean over a full step and those on S_c alone that
    follow it, medians over rounds; and of fitting the verifier. A row that has a time keeps it, since runs were made by
    it, and the others get theirs at the pace of those in this process that have one; `measured` holds what was found.
    """
    subject = Pipeline.load(args.model)
    subject.heads = subject.verifier = subject.threshold = None
    start = time.perf_counter()
    verifier = fitted(subject, settings_of("alone-r0", args.eps, 0, 1, args.model))
    fit = time.perf_counter() - start
    assert isinstance(verifier, Verifier)
    samples, runs = training_samples(DATA, TASK), {}
    for row in args.only or [row for row in ROWS if not row.endswith("-one")]:
        settings = settings_of(row, args.eps, 0, 1, args.model)
        arguments = training_arguments(settings, args.work)
        heads = verifier if needs_consistency(settings) else None
        batch = next(training_batches(subject, samples, settings.batch_size, 0, heads and heads.statements))
        with trained_by(row):
            step = stepper(subject, arguments, {}, heads)[1]
        runs[row] = (arguments.consistency_steps + 1, lambda b=batch: b, step)
    path = args.out / "times.json"
    before = json.loads(path.read_text()) if path.exists() else {"seconds_a_step": {}, "measured": []}
    found = alternating(runs, args.rounds) | {"fit": fit}
    known = before["seconds_a_step"]
    pace = statistics.median([known[row] / found[row] for row in found if row in known] or [1.0])
    record = {row: pace * seconds for row, seconds in found.items()} | known
    measured = [*before["measured"], {"seconds": found, "rounds": args.rounds, "versions": versions()}]
    write_results({"seconds_a_step": record, "measured": measured}, path)
    print(json.dumps(record, indent=2))


def run(args: argparse.Namespace) -> None:
    times = json.loads((args.out / "times.json").read_text())["seconds_a_step"]
    budget = f"{args.steps}-steps" if args.steps else f"{args.seconds:g}-s"
    jobs = [(row, seed) for seed in args.seeds for row in args.only or ROWS]
    for row, seed in jobs[args.share[0] :: args.share[1]]:
        name = f"{row}-{budget}-seed{seed}"
        path = args.out / "runs" / f"{name}.json"
        if path.exists():
            if (eps := json.loads(path.read_text())["settings"]["eps"]) != args.eps:
                raise ValueError(f"{path} was run at eps {eps}, not {args.eps}; name another folder with --out")
            continue
        steps = args.steps or steps_within(row, args.seconds, times)
        print(f"== {name}: {steps} steps", flush=True)
        with trained_by(row):
            record = one(settings_of(row, args.eps, seed, steps, args.model), args.work / name, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        budgets = {"budget": budget, "seconds_by_cpu": steps * step_time(row, times)}
        write_results(
            record | {"row": row, "title": ROWS[row][0], "seed": seed} | budgets | {"versions": versions()}, path
        )


# What of the rows, and of the table of full_strength.py, is one line of the plot; the most robust of a line at a time.
LINES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "CMAI": (("cmai",), (), "#c2410c"),
    "bridge": (
        ("half-r0", "bridge-r0", "bridge-r0-k5", "bridge-r1", "bridge-r1-k5", "bridge-r2"),
        ("mbat-bridge-r1", "mbat-bridge-r1-equal-time"),
        "#1d4ed8",
    ),
    "exact PGD": (("pgd-10", "pgd-5", "pgd-3", "pgd-2"), ("mbat-pgd",), "#374151"),
    "FARE": (("fare",), (), "#15803d"),
    "Sim-CLIP": (("sim-clip",), (), "#a16207"),
    "one step": (("fgsm-rs", "n-fgsm"), ("fgsm-rs", "fgsm-rs-equal-time"), "#7e22ce"),
    "Free": (("free",), (), "#be185d"),
}
STYLE = """text { font: 12px system-ui, sans-serif; fill: #6b7280 } .y { text-anchor: end } .x { text-anchor: middle }
path { fill: none } .grid { stroke: #9ca3af55 } .axis { stroke: #9ca3af } .line { stroke-width: 2 }
.marker { stroke-width: 2; fill: #fff } .hit { fill: none } text.end { font-weight: 650 }"""


def table(args: argparse.Namespace) -> None:
    found = [json.loads(p.read_text()) for p in sorted((args.out / "runs").glob("*.json"))]
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in found:
        grouped.setdefault((record["budget"], record["row"]), []).append(record)
    best_first = sorted(grouped.items(), key=lambda item: (item[0][0], -_mean(item[1], "acc_robust")))
    lines = ["| Budget | Row | Seeds | Clean | Robust | ASR | Steps | Seconds per step |", "|" + "---|" * 8]
    for (budget, row), mine in best_first:
        title = ROWS[row][0] if row in ROWS else mine[0]["title"]
        steps = mine[0]["settings"]["max_steps"]
        shares = [share([r[key] for r in mine]) for key in ("acc_clean_whole_test_split", "acc_robust", "asr")]
        pace = f"{mine[0]['seconds_by_cpu'] / steps:.2f}"
        lines.append("| " + " | ".join([budget, title, str(len(mine)), *shares, str(steps), pace]) + " |")
    write_text("\n".join(lines) + "\n", args.out / "table.md")
    print("\n".join(lines))
    if args.model == BASE.model:  # that of the table with which it is drawn
        write_text(plot(grouped, args.strength), args.out / "frontier.svg")


def plot(grouped: dict[tuple[str, str], list[dict[str, Any]]], strength: Path) -> str:
    """Robust accuracy over training time as an SVG file."""
    others = {row["defence"]: row for row in json.loads(strength.read_text())["rows"]}
    drawn = []
    for name, (rows, defences, _) in LINES.items():
        at: dict[float, float] = {}
        for (budget, row), mine in grouped.items():
            if row in rows and budget.endswith("-s"):
                seconds = float(budget.removesuffix("-s"))
                at[seconds] = max(at.get(seconds, 0.0), _mean(mine, "acc_robust"))
        at |= {others[d]["seconds"]: others[d]["acc_robust"]["mean"] for d in defences}
        if at:
            drawn.append(Line(name, name.replace(" ", "-").lower(), sorted(at.items()), marker="circle"))
    times = [seconds for line in drawn for seconds, _ in line.points]
    ticks = tuple((float(t), f"{t:,}") for t in (100, 200, 400, 800, 1600) if min(times) <= 1.1 * t <= 1.3 * max(times))
    x = Axis("training time, seconds of one CPU thread", 0.9 * min(times), 1.1 * max(times), ticks, log=True)
    y = Axis("robust accuracy", 0.5, 0.9, tuple((v / 100, f"{v}%") for v in range(50, 91, 10)))
    chart = line_chart(drawn, x, y, "Robust accuracy over training time, by way to train")
    colours = "".join(
        f".{name.replace(' ', '-').lower()} {{ stroke: {colour} }} text.{name.replace(' ', '-').lower()} "
        f"{{ stroke: none; fill: {colour} }}"
        for name, (_, _, colour) in LINES.items()
    )
    start = '<svg xmlns="http://www.w3.org/2000/svg"'
    back = '<rect width="100%" height="100%" fill="#fff"/>'
    return str(chart).replace("<svg", start, 1).replace(">", f"><style>{STYLE} {colours}</style>{back}", 1) + "\n"


def _mean(records: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(r[key] for r in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time", "table"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frontier"))
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="checkpoints and trained models")
    parser.add_argument("--model", default=BASE.model, help="what every row starts from; with another, name --out")
    parser.add_argument("--eps", type=parse_eps, default=16 / 255)
    parser.add_argument("--steps", type=int, help="as many optimizer steps for each row")
    parser.add_argument("--seconds", type=float, default=420.0, help="without --steps: of training, by times.json")
    parser.add_argument("--only", nargs="*", choices=tuple(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="the I-th of N parts")
    parser.add_argument("--limit", type=int, default=500, help="test questions attacked")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of time")
    strength = Path("benchmarks/results/easyvqa/table.json")
    parser.add_argument("--strength", type=Path, default=strength, help="of full_strength.py, for the plot")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"run": run, "time": measure_time, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
