"""What an MBAT step costs over a clean fine-tuning step of the same model, batch and precision."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.pipeline import Pipeline

# Settings that turn an MBAT step into the clean fine-tuning step it is compared with.
CLEAN_STEP: dict[str, Any] = {
    "objective": "task",  # these first: beside what follows they would be refused
    "anchor": 0.0,
    "cuda_graphs": False,
    "inner": "none",
    "gamma": 0.0,
    "beta": 0.0,
    "arm": False,
    "lam": 0.0,
    "consistency_steps": 0,
}


class SavedActivations:
    """Peak bytes that autograd saves for a backward pass, without parameters. Use as a context; then read `peak`.

    A tensor saved by several operations counts once; tensors kept by `recompute="selective"` are not counted. On the
    CPU, PyTorch does not record peak memory; saved bytes are what recomputation, frozen weights and batch size change.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.peak = self.live = 0
        self._holders: dict[int, int] = {}
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __enter__(self) -> SavedActivations:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(self, t), lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def hold(self, storage: int, size: int) -> None:
        if storage in self._parameters:
            return
        if not self._holders.get(storage):
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[storage] = self._holders.get(storage, 0) + 1

    def release(self, storage: int, size: int) -> None:
        if storage in self._parameters:
            return
        self._holders[storage] -= 1
        if not self._holders[storage]:
            self.live -= size


class _Held:
    """A saved tensor that reports when autograd frees it."""

    def __init__(self, owner: SavedActivations, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.owner, self.storage, self.size = tensor, owner, storage.data_ptr(), storage.nbytes()
        owner.hold(self.storage, self.size)

    def __del__(self) -> None:
        self.owner.release(self.storage, self.size)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Memory before a call and its peak during the call: allocated by PyTorch on a GPU, the resident set of the process
    on the CPU (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return before, torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = _resident_bytes("VmRSS")
    run()
    return before, _resident_bytes("VmHWM")


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def step_overhead(
    subject: Pipeline,
    args: MBATConfig,
    batch: dict[str, Tensor],
    *,
    heads: ConsistencyHeads | Verifier | None = None,
    rounds: int = 5,
) -> dict[str, float | str | int]:
    """`time_ratio` and `memory_ratio` of an MBAT step with `args` over a clean step: medians of alternating runs.

    With `consistency_steps` the time is the mean over a full step and those that follow it, the memory that of a full
    one. Both run forward, backward and optimiser step on copies of the model, which is not changed. `heads`: as of
    `MBATTrainer`; `batch` holds what they learn from.
    """
    runs = {"clean": stepper(subject, args, CLEAN_STEP), "mbat": stepper(subject, args, {}, heads)}
    peaks = {}
    for name, (model, step) in runs.items():
        with SavedActivations(model) as held:
            step(batch)  # also warms up
        peaks[name] = held.peak
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {"clean": 1, "mbat": args.consistency_steps + 1}  # a full step, and those on S_c alone that follow it
    for _ in range(rounds):
        for name, (_, step) in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step(batch)
            times[name].append((time.perf_counter() - start) / repeats[name])
    clean, mbat = statistics.median(times["clean"]), statistics.median(times["mbat"])
    alone = args.consistency_steps
    mean = f"; time of MBAT: the mean over a full step and the {alone} on S_c alone that follow it" if alone else ""
    return {
        "time_ratio": mbat / clean,
        "memory_ratio": peaks["mbat"] / peaks["clean"],
        "clean_step_s": clean,
        "mbat_step_s": mbat,
        "clean_saved_bytes": peaks["clean"],
        "mbat_saved_bytes": peaks["mbat"],
        "protocol": f"batch {len(batch['labels'])}, forward + backward + optimiser, {rounds} rounds, alternating, "
        f"medians{mean}; memory: peak bytes saved for backward; {torch.get_num_threads()} threads, {args.device}",
    }


def stepper(
    subject: Pipeline,
    args: MBATConfig,
    changes: dict[str, Any],
    heads: ConsistencyHeads | Verifier | None = None,
) -> tuple[torch.nn.Module, Callable[[dict[str, Tensor]], None]]:
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    model = copy.deepcopy(subject.model).to(args.device)
    scored = args.gamma or args.beta or args.arm or args.consistency_steps
    heads = copy.deepcopy(heads or subject.heads) if scored else None
    trainer = MBATTrainer(model, args, processing_class=subject.processor, heads=heads)
    trainer.create_optimizer()

    def step(batch: dict[str, Tensor]) -> None:
        trainer.training_step(model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1

    return model, step
