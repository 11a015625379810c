"""Who takes what share of an MBAT step: the self time of every operator by torch.profiler, by the part that runs it.

    python benchmarks/recipes/profile_step.py --model easyvqa-llava      # the bundled model, batch size 64
    python benchmarks/recipes/profile_step.py --model llava-100m         # 143M parameters, random weights, batch size 2
    python benchmarks/recipes/profile_step.py --model easyvqa-llava --refreshes 1 --out runs/profiles

A part is a side of the model, the optimizer, the heads, an operator of `cmai_fast.ops`, the loss of the tokens where it
is computed in chunks, or the loop, which is all the rest: also the output layer, where the model calls it itself. A
backward pass counts for the part whose forward pass recorded it. "(Python)" is time in which PyTorch ran no operator:
Python itself, and kernels of this library that PyTorch's dispatcher does not see. One step on the CPU, after one that
warms up; the profiler itself makes small operators look larger.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from sized_models import MODELS, build
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from cmai_fast import ops
from cmai_fast.bridge import output_layer
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.ops.schema import SCHEMAS
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows.samples import training_batches, training_samples

_PART = "part: "
PYTORCH = ("vision side", "language side", "optimizer")  # the others are this library's
BATCHES = {"easyvqa-llava": 64, "llava-100m": 2}


def prepared(args: argparse.Namespace) -> tuple[MBATTrainer, dict[str, Tensor]]:
    config = MBATConfig(
        output_dir=str(args.out / "profile"), report_to="none", use_cpu=True, inner="bridge", refreshes=args.refreshes,
        inner_steps=args.inner_steps,
    )  # fmt: skip
    if args.model in MODELS:
        sized = MODELS[args.model]()
        model = build(sized, None, torch.device("cpu"), torch.float32)
        return MBATTrainer(model, config, processing_class=sized.processor), sized.batch(args.batch, 32, 8)
    pipeline = Pipeline.load(args.model)
    batch = next(training_batches(pipeline, training_samples(DataSource("easyvqa"), "vqa"), args.batch, 0))
    return MBATTrainer(pipeline.model, config, processing_class=pipeline.processor, heads=pipeline.heads), batch


@contextmanager
def parts_named(trainer: MBATTrainer) -> Iterator[None]:
    """Inside: each part is recorded under its name."""
    modules = dict.fromkeys(trainer.bridge.vision_side, "vision side")
    modules[trainer.bridge.text_model] = "language side"
    if isinstance(trainer.heads, nn.Module):
        modules |= dict.fromkeys(trainer.heads.children(), "heads")
    with ExitStack() as stack:
        for module, name in modules.items():
            for handle in _recorded(module, name):
                stack.callback(handle.remove)
        for name in SCHEMAS:
            if hasattr(ops, name):
                stack.enter_context(mock.patch.object(ops, name, _named(getattr(ops, name), name)))
        losses = _named(output_layer.token_losses, "token loss")
        stack.enter_context(mock.patch.object(output_layer, "token_losses", losses))
        yield


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PART + name):
            return function(*args, **kwargs)

    return run


def _recorded(module: nn.Module, name: str) -> list[Any]:
    running: list[record_function] = []

    def begin(*_: Any) -> None:
        running.append(record_function(_PART + name))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]


def shares(events: Any) -> tuple[float, Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Seconds in all; seconds of self time and calls by (part, operator)."""
    part_of: dict[int, str] = {}  # of an event
    recorded_by: dict[int, str] = {}  # the part whose forward pass took this number in the order of autograd
    seconds: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        part = part_of.get(event.cpu_parent.id, "loop") if event.cpu_parent is not None else "loop"
        operator = event.name
        if event.name.startswith((_PART, "Optimizer.")):
            part = event.name.removeprefix(_PART) if event.name.startswith(_PART) else "optimizer"
            operator = "(Python)"
        elif event.name.startswith("autograd::engine"):
            part = recorded_by.get(event.sequence_nr, part)
            operator = event.name.rpartition(": ")[2]
        elif event.sequence_nr >= 0:
            # Operations that record nothing carry the number of the next that does, which then overwrites it here.
            recorded_by[event.sequence_nr] = part
        part_of[event.id] = part
        seconds[part, operator] += event.self_cpu_time_total / 1e6
        calls[part, operator] += not event.name.startswith("autograd::engine")  # which wraps a node of the same name
    return sum(seconds.values()), seconds, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(BATCHES), required=True)
    parser.add_argument("--batch", type=int, help="samples; default: 64 of easyvqa-llava, 2 of llava-100m")
    parser.add_argument("--inner-steps", type=int, default=10, help="K")
    parser.add_argument("--refreshes", type=int, default=0, help="R")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--least", type=float, default=0.01, help="smallest share of a row of the table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of profile-MODEL.json")
    args = parser.parse_args()
    args.batch = args.batch or BATCHES[args.model]
    torch.set_num_threads(args.threads)
    trainer, batch = prepared(args)
    optimizer = trainer.create_optimizer()

    def step() -> None:
        with record_function(_PART + "loop"):
            trainer.training_step(trainer.model, dict(batch))
            optimizer.step()
            optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, parts_named(trainer):
        step()
    total, seconds, calls = shares(profiler.events())
    by_part: Counter[str] = Counter()
    for (part, _), spent in seconds.items():
        by_part[part] += spent
    rows = [
        {"part": part, "operator": name, "share": spent / total, "calls": calls[part, name]}
        for (part, name), spent in seconds.most_common()
        if spent >= args.least * total
    ]
    record = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"} | {"solver": "bridge", "device": "cpu"},
        "protocol": "self CPU time by torch.profiler of one training step after one that warms up",
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "profiled_seconds": total,
        "pytorch_share": sum(by_part[part] for part in PYTORCH) / total,
        "share_by_part": {part: spent / total for part, spent in by_part.most_common()},
        "rows": rows,
        "versions": versions(),
    }
    file = write_results(record, args.out / f"profile-{args.model}.json")
    print_tables(record)
    print(f"written to {file}")


def print_tables(record: dict[str, Any]) -> None:
    console = Console()
    parts = Table("part", "owner", "share", title=f"{record['settings']['model']}: {record['profiled_seconds']:.2f} s")
    for part, share in record["share_by_part"].items():
        parts.add_row(part, "PyTorch" if part in PYTORCH else "this library", f"{share:.1%}")
    rows = Table("operator", "part", "share", "calls", title="by operator")
    for row in record["rows"]:
        rows.add_row(row["operator"], row["part"], f"{row['share']:.1%}", str(row["calls"]))
    console.print(parts, rows)


if __name__ == "__main__":
    main()
