"""Run by `tests/launcher.py`, in one or several processes: trains the model in a folder and saves what became of it."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, training_args

from cmai_fast.cmcv import ConsistencyHeads, Verifier
from cmai_fast.data import Sample, VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer


class ShardedOnTheCPU(MBATTrainer):
    """Accelerate shards on accelerators alone and leaves a CPU's processes a copy each; this says that it may.

    All the rest is its own: what it wraps by `fully_shard`, how it prepares the optimizer, what it clips and saves.
    """

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        assert state.distributed_type == DistributedType.MULTI_CPU
        for shared in (state._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
        state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


def find_deepspeed_on_the_cpu() -> None:
    """Accelerate starts DeepSpeed on accelerators alone, and Trainer then wants one for bf16; this says that a CPU will
    do. All the rest is their own, and DeepSpeed's."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    training_args.is_torch_bf16_gpu_available = lambda: True


def count_traffic(trainer: MBATTrainer) -> Counter:
    """How often collectives that carry gradients were called and a trainable projector ran, `in attacks` and `outside`,
    as the run goes on."""
    counts, place = Counter(), ["outside"]

    def counted(name, collective):
        def call(*args, **kwargs):
            counts[f"{name} {place[0]}"] += 1
            return collective(*args, **kwargs)

        return call

    for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single"):  # the last since PyTorch 2.13
        if hasattr(dist, name):
            setattr(dist, name, counted(name.removesuffix("_tensor").removesuffix("_single"), getattr(dist, name)))

    def look(projector, *_):
        counts[f"trainable projector {place[0]}"] += any(p.requires_grad for p in projector.parameters())

    trainer.bridge.model.model.multi_modal_projector.register_forward_hook(look)
    attack = trainer._attack

    def in_attack(*args):
        place[0] = "in attacks"
        try:
            return attack(*args)
        finally:
            place[0] = "outside"

    trainer._attack = in_attack
    return counts


def run_out_of_memory(trainer: MBATTrainer, side: str, most: int) -> None:
    """On that side of a step, for more than `most` samples at once."""
    run = getattr(trainer, side)

    def limited(what, *args, **kwargs):
        result = run(what, *args, **kwargs)
        samples = len(what["labels"]) if side == "_language_side" else max(len(part.views[0].leaf) for part in what)
        if samples > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    setattr(trainer, side, limited)


def kill_at(trainer: MBATTrainer, where: str) -> None:
    """SIGKILL to this process: `in step N` between its batches, `saving step N` when the model is written."""
    step = int(where.rsplit(" ", 1)[1])

    class Kill(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def in_mid_save(folder: str) -> None:
        if folder.endswith(f"-{step}"):
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder)

    if where.startswith("in"):
        trainer.add_callback(Kill())
    else:
        save, trainer._save_optimizer_and_scheduler = trainer._save_optimizer_and_scheduler, in_mid_save


def uneven(samples, texts: bool) -> list[Sample]:
    """Every third answer is twice as long; with `texts` as many samples have no image."""
    return [
        replace(s, references=(f"{s.answer} {s.answer}",)) if i % 3 == 0
        else replace(s, images=()) if texts and i % 3 == 1 else s
        for i, s in enumerate(samples)
    ]  # fmt: skip


class Stream(IterableDataset):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


def main(folder: Path, name: str, settings: dict, kill: str = "") -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, settings.pop("dtype", "float64"))
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=dtype)
    scarce = settings.pop("scarce", None)
    for part in settings.pop("freeze", ()):
        model.model.get_submodule(part).requires_grad_(False)
    if adapters := settings.pop("adapters", False):
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False)
        model = get_peft_model(model, lora) if adapters == "wrapped" else model.add_adapter(lora) or model
    processor = AutoProcessor.from_pretrained(folder / "model")
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # heads of its own, until it is given those of the first
    width = model.config.get_text_config().hidden_size
    texts = settings.pop("texts", False)
    samples = uneven(load_dataset("easyvqa", "train", 48, seed=3), texts)
    data = Stream(samples) if settings.pop("stream", False) else samples
    without = texts or settings.get("objective", "task") != "task"
    heads = None if without else ConsistencyHeads(width, width, dim=8, hidden=16).to(dtype)
    collator = VQACollator(processor, negatives=0 if texts else 1)
    if settings.pop("verifier", False):
        heads, collator = Verifier.for_data(model, processor, samples, hidden=16, width=16, dim=8, heads=2), None
    if settings.get("deepspeed"):
        find_deepspeed_on_the_cpu()
    where = {"output_dir": str(folder / name), "use_cpu": "deepspeed" not in settings}
    args = MBATConfig(report_to="none", disable_tqdm=True, **where, **settings)
    trainer = (ShardedOnTheCPU if args.fsdp else MBATTrainer)(
        model,
        args,
        heads=heads,
        train_dataset=data,
        eval_dataset=load_dataset("easyvqa", "test", 10, seed=3),
        data_collator=collator,
        processing_class=processor,
    )
    counts = count_traffic(trainer)
    if kill:
        kill_at(trainer, kill)
    if scarce and args.process_index == 1:
        run_out_of_memory(trainer, *scarce)
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    logs = [entry for entry in trainer.state.log_history if "loss_adv" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    weights = {f"model.{k}": v for k, v in trainer.model.named_parameters()}
    weights |= {} if without else {f"heads.{k}": v for k, v in trainer.heads.named_parameters()}
    assert {isinstance(v, DTensor) for k, v in weights.items() if k.startswith("model.")} == {bool(args.fsdp)}
    weights = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights.items()}
    if args.process_index == 0:
        save_file({k: v.detach().contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(
            json.dumps(
                {
                    "logs": logs,
                    "evaluations": evaluations,
                    "arm": None if without else trainer.schedule.state_dict(),
                    "counts": +counts,
                }
            )
        )
    if dist.is_initialized():
        dist.barrier()  # the first still writes, and talks to the others for as long as it lives


def serve(orders: Iterable[str], answers: IO[str]) -> None:
    """Runs of `orders`, a JSON object per line; answers with the exit codes of each one's processes.

    Every process is a fork of this one, which has imported and trained already: what a first run imports, compiles and
    reads takes longer than most runs do.
    """
    warm = False
    for line in orders:
        order = json.loads(line)
        if not warm:
            with tempfile.TemporaryDirectory() as aside, open(os.devnull, "w") as nowhere:
                sys.stdout = sys.stderr = nowhere
                Path(aside, "model").symlink_to(Path(order["folder"], "model").absolute())
                _forget()  # trainers of other tests, in the process that this one is a fork of
                main(Path(aside), "first", {"max_steps": 1, "save_strategy": "no", "inner_steps": 1, "gamma": 0.0})
                _forget()
            gc.collect()
            gc.freeze()
            warm = True
        print(json.dumps(run(**order)), file=answers, flush=True)


def _forget() -> None:
    """What accelerate has set up for one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(folder: str, name: str, settings: dict, processes: int, kill: str) -> list[int]:
    environment = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        environment = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children, codes = [], {}
    for rank in range(processes):
        child = os.fork()
        if not child:
            code = 1
            try:
                log = os.open(Path(folder) / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)  # pytest has put its own in place of these
                os.environ |= environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {})
                main(Path(folder), name, settings, kill)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                # An interpreter that shuts down in the usual way aborts now and then ("terminate called without an
                # active exception"): a thread of gloo's is still there.
                os._exit(code)
        children.append(child)
    while len(codes) < processes:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:  # the others would wait for it
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]
