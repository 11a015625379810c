"""Time and memory of a training step at size, with random weights: neither needs trained ones.

    python benchmarks/recipes/at_size.py --model llava-7b --bits 4 --batch 8 --out llava-7b.json      # on a GPU
    python benchmarks/recipes/at_size.py --model llava-100m --batch 2 --out llava-100m.json           # on a CPU

`sized_models.py` says what the models are. The language model is frozen, in 4 or 8 bits or as it is; the vision side
learns. Steps alternate, medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from sized_models import MODELS, build
from torch import Tensor

from cmai_fast.bridge import bridge_of
from cmai_fast.bridge.dual import DualBridge
from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data.statements import STATEMENT_ANSWERS, STATEMENT_IDS
from cmai_fast.evaluation.overhead import CLEAN_STEP, peak_bytes
from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.mbat import MBATConfig, MBATTrainer

_ALONE: dict[str, Any] = {"beta": 0.0, "gamma": 0.0, "arm": False}  # without S_c
_CONSISTENT: dict[str, Any] = {"gamma": 1.0, "beta": 0.0, "arm": False, "consistency_steps": 5, "anchor": 1.0}
STEPS: dict[str, dict[str, Any]] = {
    "clean": CLEAN_STEP,
    "pgd-at": {"inner": "pgd", "lam": 1.0, "beta": 0.0, "gamma": 0.0},
    "mbat-pgd": {"inner": "pgd"},
    "mbat-bridge-r0": {"inner": "bridge", "refreshes": 0},
    "bridge-r0": {"inner": "bridge", "refreshes": 0, **_ALONE},
    # The mean over a full step and five on S_c alone.
    "cmai": {"inner": "bridge", "refreshes": 0, **_CONSISTENT},
    "cmai-graphs": {"inner": "bridge", "refreshes": 0, "cuda_graphs": True, **_CONSISTENT},
    "bridge-r0-graphs": {"inner": "bridge", "refreshes": 0, "cuda_graphs": True, **_ALONE},
    "mbat-bridge-r1": {"inner": "bridge", "refreshes": 1},
    "mbat-bridge-r2": {"inner": "bridge", "refreshes": 2},
}


def steps(
    model: Any, processor: Any, batch: dict[str, Tensor], names: Sequence[str], out: Path, **settings: Any
) -> dict[str, Callable[[], None]]:
    """Forward, backward and a step of the optimiser, by name, or as many as `cycle_of` it says; all of them train the
    same model with the same optimiser, so that the memory of one holds no other's state."""
    runs: dict[str, Callable[[], None]] = {}
    optimizer: Any = None
    for name in names:
        config = MBATConfig(output_dir=str(out), report_to="none", **settings, **STEPS[name])
        verifier = untrained_verifier(model) if config.consistency_steps else None
        trainer = MBATTrainer(model, config, processing_class=processor, heads=verifier)
        optimizer = optimizer or trainer.create_optimizer()
        own = stated(batch) if verifier else batch

        def step(trainer: MBATTrainer = trainer, optimizer: Any = optimizer, batch: dict[str, Tensor] = own) -> None:
            trainer.training_step(model, dict(batch))
            optimizer.step()
            optimizer.zero_grad()
            if trainer.heads is not None:
                trainer.heads.zero_grad()  # it learns nothing here: a thousandth of the weights that do
            trainer.state.global_step += 1

        runs[name] = cycle(step, cycle_of(name))
    return runs


def cycle_of(name: str) -> int:
    """Steps after which these repeat: a full one, and those on S_c alone."""
    return 1 + int(STEPS[name].get("consistency_steps", 0))


def cycle(step: Callable[[], None], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            step()

    return run


def applicable(model: Any, device: torch.device) -> list[str]:
    """All steps that a model can take: a dual encoder has no questions to verify, and a CPU no graphs."""
    verified, graphs = not isinstance(bridge_of(model), DualBridge), device.type == "cuda"
    return [
        n for n, values in STEPS.items() if (cycle_of(n) == 1 or verified) and (graphs or not values.get("cuda_graphs"))
    ]


def untrained_verifier(model: Any) -> Verifier:
    return Verifier.new(bridge_of(model), None, Alternatives((("yes", "no"),)))


def stated(batch: dict[str, Tensor], statements: int = 4, answers: int = 8, length: int = 12) -> dict[str, Tensor]:
    """The batch, with as much said of each picture as easy-VQA says, in random words."""
    shape = len(batch["labels"]), statements, answers
    ids = torch.randint(3, int(batch["labels"].max()) + 1, (*shape, length), generator=torch.Generator().manual_seed(0))
    return {**batch, STATEMENT_IDS: ids, STATEMENT_ANSWERS: torch.ones(shape, dtype=torch.long)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of the language model's layers; default: as they are")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt beside the image's")
    parser.add_argument("--answer", type=int, default=8, help="tokens of the response")
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--recompute", default="none", help="none, encoder, selective or full")
    parser.add_argument("--attention", default="sdpa", help="sdpa, flash_attention_2 or eager")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(STEPS), help="default: all that the model can take")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file with the numbers")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sized = MODELS[args.model]()
    start = time.perf_counter()
    model = build(sized, args.bits, device, dtype, args.attention)
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
    batch = sized.batch(args.batch, args.prompt, args.answer)
    args.only = args.only or applicable(model, device)
    settings = {"inner_steps": args.inner_steps, "recompute": args.recompute, "bf16": device.type == "cuda"}
    runs = steps(model, sized.processor, batch, args.only, args.out.with_suffix(""), **settings)
    memory = {name: peak_bytes(run, device)[1] for name, run in track(runs.items(), "first steps")}  # warms up too
    times: dict[str, list[float]] = {name: [] for name in runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for done in track(range(1, args.rounds + 1), "rounds of all steps"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - start) / cycle_of(name))
        seconds = {name: statistics.median(t) for name, t in times.items()}
        record = {
            "settings": {k: v for k, v in vars(args).items() if k != "out"} | {"rounds": done},
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_a_step": seconds,
            "over_clean": {n: s / seconds["clean"] for n, s in seconds.items()} if "clean" in seconds else None,
            "peak_bytes": memory,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "precision": str(dtype),
            "versions": versions(),
        }
        write_results(record, args.out)  # after each round: the time on a GPU may end
    for name in runs:
        ratio = f"{record['over_clean'][name]:.2f} of a clean step, " if record["over_clean"] else ""
        print(f"{name:16} {seconds[name]:.3f} s, {ratio}peak {memory[name] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
