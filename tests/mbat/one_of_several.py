"""Run by other tests in one or several processes: trains the model in a folder and saves what became of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer


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


def main(folder: Path, name: str, settings: dict, kill: str = "") -> None:
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float64)
    processor = AutoProcessor.from_pretrained(folder / "model")
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # heads of its own, until it is given those of the first
    width = model.config.get_text_config().hidden_size
    heads = ConsistencyHeads(width, width, dim=8, hidden=16).double()
    args = MBATConfig(output_dir=str(folder / name), use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    trainer = MBATTrainer(
        model,
        args,
        heads=heads,
        train_dataset=load_dataset("easyvqa", "train", 48, seed=3),
        eval_dataset=load_dataset("easyvqa", "test", 10, seed=3),
        data_collator=VQACollator(processor, negatives=1),
        processing_class=processor,
    )
    if kill:
        kill_at(trainer, kill)
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    logs = [entry for entry in trainer.state.log_history if "loss_adv" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if args.process_index == 0:
        weights = {f"model.{k}": v for k, v in trainer.model.named_parameters()}
        weights |= {f"heads.{k}": v for k, v in trainer.heads.named_parameters()}
        save_file({k: v.detach().contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(
            json.dumps({"logs": logs, "evaluations": evaluations, "arm": trainer.schedule.state_dict()})
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), *sys.argv[4:])
