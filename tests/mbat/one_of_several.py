"""Run by test_ranks.py in one or several processes: trains the model in a folder and saves what became of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer


def main(folder: Path, name: str, settings: dict) -> None:
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
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
