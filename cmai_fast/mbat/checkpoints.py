"""Checkpoints of a training run, on disk and on the hub, for bit-exact resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints

from cmai_fast.attacks import Passes
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.mbat import shards
from cmai_fast.mbat.adapters import WEIGHTS, check_saving, has_adapters, load_adapters
from cmai_fast.mbat.adaptive import AdaptiveTrainer
from cmai_fast.mbat.quantized import is_quantized

COMPLETE = "complete"  # written last; a checkpoint without it was interrupted
_STATE = "mbat.json"
_HEADS_OPTIMIZER = "heads_optimizer.pt"
_DEEPSPEED = "global_step*"  # a folder of its own files, with the optimizer
# `eps` in the [0, 1] pixel range.
_IN_CARD = (
    "objective", "eps", "norm", "inner", "inner_steps", "refreshes", "alpha", "beta", "consistency_steps", "anchor",
    "lam", "gamma", "arm", "beta_max", "eps_max", "lam_max", "trainable", "modality", "text_eps", "text_norm",
)  # fmt: skip


class CheckpointedTrainer(AdaptiveTrainer):
    """A `Trainer` whose checkpoints hold the heads (`cmcv/`) and their optimizer, ARM's state and the passes so far
    (`mbat.json`) and, written last, the file `complete`."""

    optimizer: Any
    passes: Passes

    def _let_heads_learn(self) -> None:
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, and the heads in `cmcv/`; all processes wait until it is written."""
        super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        check_saving(self.model, Path(output_dir or self.args.output_dir))
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # with a sharded model, every process gets here
            self._save_heads(Path(output_dir or self.args.output_dir) / "cmcv")

    def _save_heads(self, folder: Path) -> None:
        saved = self.verifier or self.heads
        if isinstance(saved, (Verifier, ConsistencyHeads)):
            saved.save_pretrained(folder)

    def _saved_heads(self, folder: Path) -> Verifier | ConsistencyHeads:
        """Those of a checkpoint."""
        if self.verifier is None:
            return ConsistencyHeads.from_pretrained(folder)[0]
        return Verifier.from_pretrained(folder, self.verifier.bridge, self.verifier.tokenizer)[0]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)  # of an earlier run in the same folder
        # Older checkpoints are deleted only when this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its random state
        if not self.args.should_save:
            return
        state = {"arm": self.schedule and self.schedule.state_dict(), "passes": vars(self.passes)}
        (folder / _STATE).write_text(json.dumps(state))
        for path in folder.rglob("*"):
            if path.is_file():
                _flush(path)
        (folder / COMPLETE).touch()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        best = self.state.best_model_checkpoint
        rotate_checkpoints(self.args.output_dir, limit, best_model_checkpoint=best, use_mtime=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        if self.is_fsdp_enabled:
            (Path(output_dir) / "pytorch_model_fsdp.bin").unlink(missing_ok=True)  # model.safetensors holds the same
        if self._heads_optimizer is not None:
            torch.save(self._heads_optimizer.state_dict(), Path(output_dir) / _HEADS_OPTIMIZER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if self.is_deepspeed_enabled:  # which has loaded the weights by itself
            self._load_beside(folder)
        elif any(folder.glob(_DEEPSPEED)):  # Trainer would go on with a new optimizer
            raise ValueError(
                f"{folder} was saved with DeepSpeed, which alone can read its optimizer; resume with deepspeed set, or "
                "start a new run from its weights"
            )
        self._let_heads_learn()
        self._check_heads_optimizer(folder)
        if self.is_fsdp_enabled:
            if not (folder / "optimizer.bin").is_file():
                raise ValueError(
                    f"{folder} has no optimizer.bin: it was saved by a run whose model was not sharded, or without its "
                    "optimizer. Continue without FSDP, or start a new run from its weights"
                )
            shards.load_optimizer(self.model, self.optimizer, folder / "optimizer.bin")
            self.lr_scheduler.load_state_dict(_read(folder / "scheduler.pt"))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if self._heads_optimizer is not None and (folder / _HEADS_OPTIMIZER).is_file():
            self._heads_optimizer.load_state_dict(_read(folder / _HEADS_OPTIMIZER))

    def _check_heads_optimizer(self, folder: Path) -> None:
        there = (folder / _HEADS_OPTIMIZER).is_file()
        if there == (self._heads_optimizer is not None) or not (
            any(folder.glob("optimizer.*")) or any(folder.glob(_DEEPSPEED))
        ):
            return  # saved with save_only_model, without optimizers
        if there:
            raise ValueError(
                f"{folder} was saved by a run that trained the heads, and gamma is {self.args.gamma} now; resume with "
                "the settings that it was saved with"
            )
        raise ValueError(
            f"{folder} has no {_HEADS_OPTIMIZER}: it was saved by a run with gamma=0, or by an older version, in which "
            "the heads had no optimizer of their own. Start a new run from its model, with "
            "heads=ConsistencyHeads.from_pretrained(folder / 'cmcv')[0]"
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's, for complete checkpoints only, and the heads beside the model; see `hub_strategy`."""
        checkpoint = Path(checkpoint_folder)
        if not (checkpoint / COMPLETE).is_file():
            return  # Trainer's own call comes too early: `_save_checkpoint` calls again
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        uploading = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.heads is not None and (self.args.hub_always_push or not uploading):
            self._saved_heads(checkpoint / "cmcv").save_pretrained(Path(self.args.output_dir) / "cmcv")
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the settings of adversarial training."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        values = {name: getattr(self.args, name) for name in _IN_CARD} | {"arm": self.schedule is not None}
        settings = "\n".join(f"- {name}: {value}" for name, value in values.items())
        before, heading, after = path.read_text(encoding="utf-8").partition("### Framework versions")
        card = f"{before}### Adversarial training (MBAT)\n\n{settings}\n\n{heading}{after}"
        path.write_text(card, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        _check_complete(folder)
        self._load_weights(folder, self.model if model is None else model)
        self._load_beside(folder)

    def _load_beside(self, folder: Path) -> None:
        """Heads, ARM's state and the passes so far."""
        _check_complete(folder)
        if self.heads is not None:
            saved = self._saved_heads(folder / "cmcv")
            self.heads.load_state_dict((saved.network if isinstance(saved, Verifier) else saved).state_dict())
        state = json.loads((folder / _STATE).read_text())
        self.passes = Passes(**state["passes"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["arm"] or {})

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint or ""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            self._load_beside(Path(folder))
        else:
            self._load_from_checkpoint(folder)

    def _load_weights(self, folder: Path, model: nn.Module) -> None:
        """Replaces Trainer's own loading, which fails for LLaVA.

        `save_pretrained` writes the parameter names of the hub's checkpoints. `from_pretrained` maps them back, but
        Trainer does not: it finds none of its names in the file, warns, and continues with the current weights. It
        does not find adapters of `add_adapter` either.
        """
        if has_adapters(model):
            load_adapters(folder, model)
            return
        if (folder / WEIGHTS).is_file():
            raise ValueError(
                f"{folder} holds only adapters, and the model has none; resume with the model that they belong to"
            )
        if not any(folder.glob("*.safetensors*")):
            raise ValueError(
                f"{folder} holds no safetensors weights; other formats can run code when read, and are refused"
            )
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(str(folder), model)
            return
        saved, report = shards.plain_class(model).from_pretrained(
            folder, use_safetensors=True, dtype=model.dtype, output_loading_info=True
        )
        wrong = {what: sorted(map(str, names)) for what, names in report.items() if names}
        if wrong:
            raise ValueError(
                f"the weights in {folder} do not fit the model: {wrong}; resume with the model that they belong to"
            )
        state, frozen_codes = saved.state_dict(), is_quantized(model)
        if frozen_codes:  # quantised codes never change, and cannot be copied into
            state = {name: state[name] for name, p in model.named_parameters() if p.requires_grad}
        shards.load(model, state, strict=not frozen_codes)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of an `MBATTrainer` in `folder`, or None."""
    found = [p.parent for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def _check_complete(folder: Path) -> None:
    if not (folder / COMPLETE).is_file():
        raise ValueError(
            f"{folder} has no file {COMPLETE!r}: it was interrupted or is not from MBATTrainer. "
            "cmai_fast.mbat.last_checkpoint(folder) finds the last complete one"
        )


def _read(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _flush(path: Path) -> None:
    """Flushes to disk, so that after a power cut `complete` is never beside an incomplete file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
