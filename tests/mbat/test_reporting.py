"""What leaves a run while it trains: logs for callbacks and TensorBoard, and uploads to the hub."""

from __future__ import annotations

import sys
import types
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from torch.utils.data import Subset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from transformers.integrations import TensorBoardCallback, integration_utils

from cmai_fast.cmcv import ConsistencyHeads

PARTS = ("loss_clean", "loss_adv", "loss_contrastive", "s_c_adv", "beta", "nonfinite_gradients")
EVALUATED = ("loss", "accuracy", "robust_loss", "robust_accuracy", "s_c", "robust_s_c")


class Logs(TrainerCallback):
    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append((state.global_step, dict(logs)))


def test_callbacks_are_given_the_parts_of_the_loss_and_the_evaluation(make_trainer, data):
    logs = Logs()
    make_trainer(
        callbacks=[logs], max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=4, eval_attack_steps=1,
        save_strategy="no", eval_dataset=Subset(data, range(3)),
    ).train()  # fmt: skip
    trained = [(step, entry) for step, entry in logs.entries if "loss_adv" in entry]
    assert [step for step, _ in trained] == [2, 4]
    assert all(isinstance(entry[part], float) for _, entry in trained for part in PARTS)
    evaluated = [(step, entry) for step, entry in logs.entries if "eval_loss" in entry]
    assert [step for step, _ in evaluated] == [4]
    assert all(isinstance(evaluated[0][1][f"eval_{name}"], float) for name in EVALUATED)


def test_tensorboard_is_given_scalars(make_trainer, data, monkeypatch):
    """By transformers' own callback, which `report_to="tensorboard"` chooses; the writer alone is a stand-in."""
    written = []

    class SummaryWriter:
        def __init__(self, log_dir=None):
            self.log_dir = log_dir

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def add_text(self, *args):
            pass

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    trainer = make_trainer(
        max_steps=2, eval_strategy="steps", eval_steps=2, eval_attack_steps=1, save_strategy="no",
        report_to="tensorboard", eval_dataset=Subset(data, range(3)),
    )  # fmt: skip
    assert any(isinstance(c, TensorBoardCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    names = {entry[0] for entry in written if entry != "closed"}
    assert {f"train/{part}" for part in PARTS} | {f"eval/{name}" for name in EVALUATED} <= names
    logged = {entry["step"]: entry["loss_adv"] for entry in trainer.state.log_history if "loss_adv" in entry}
    assert {step: value for name, value, step in written[:-1] if name == "train/loss_adv"} == logged
    assert written[-1] == "closed"


@pytest.fixture
def hub(monkeypatch):
    """Records what would be sent: (folder in the repository, message, {path: bytes})."""
    sent, pending = [], []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, *, repo_id, folder_path, run_as_future=False, ignore_patterns=None, **kwargs):
        assert repo_id == "somebody/tried"
        root = Path(folder_path)
        paths = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()]
        files = {p: (root / p).read_bytes() for p in filter_repo_objects(paths, ignore_patterns=ignore_patterns)}
        sent.append((kwargs.get("path_in_repo", ""), kwargs["commit_message"], files))
        future = Future()
        if hub.slow:
            pending.append(future)
        else:
            future.set_result(None)
        return future if run_as_future else None

    hub = SimpleNamespace(sent=sent, pending=pending, slow=False)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return hub


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_is_pushed_is_the_plain_model_its_heads_and_a_card(make_trainer, data, hub, tmp_path):
    trainer = make_trainer(
        hub_model_id="tried", eval_strategy="steps", eval_steps=2, eval_attack_steps=1, eps=4 / 255, inner="pgd",
        inner_steps=3, eval_dataset=Subset(data, range(3)),
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    ((place, message, files),) = hub.sent
    assert (place, message) == ("", "End of training")
    assert not any("checkpoint" in name or "optimizer" in name for name in files)
    folder = written(tmp_path / "downloaded", files)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True))
    assert AutoProcessor.from_pretrained(folder).image_processor.image_mean == (0.5, 0.4, 0.3)
    heads, _ = ConsistencyHeads.from_pretrained(folder / "cmcv")
    assert all(torch.equal(p, q) for p, q in zip(heads.parameters(), trainer.heads.parameters(), strict=True))
    card = files["README.md"].decode()
    lines = (f"- eps: {4 / 255}", "- norm: linf", "- inner: pgd", "- inner_steps: 3", "- gamma: 0.5", "- anchor: 0.0")
    for line in lines:
        assert f"{line}\n" in card, line
    assert card.count("### Adversarial training (MBAT)") == card.count("### Framework versions") == 1
    assert "Robust Accuracy" in card and "learning_rate: 0.01" in card
    trainer.create_model_card()
    assert (tmp_path / "out" / "README.md").read_text().count("### Adversarial training (MBAT)") == 1


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_pushes_in_mid_training_belong_to_the_step(make_trainer, hub, tmp_path, strategy):
    trainer = make_trainer(push_to_hub=True, hub_model_id="tried", hub_strategy=strategy)
    states = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states[state.global_step] = trainer.heads.image_out.weight.detach().clone()

    trainer.add_callback(Keep())
    trainer.train()
    models = [(message, files) for place, message, files in hub.sent if not place]
    checkpoints = [(place, files) for place, _, files in hub.sent if place]
    steps = [] if strategy == "end" else [2, 4]
    assert [message for message, _ in models] == [f"Training in progress, step {step}" for step in steps]
    for step, (_, files) in zip(steps, models, strict=True):
        folder = written(tmp_path / f"model-{step}", files)
        AutoModelForImageTextToText.from_pretrained(folder)
        assert torch.equal(ConsistencyHeads.from_pretrained(folder / "cmcv")[0].image_out.weight, states[step])
    names = {"checkpoint": ["last-checkpoint"] * 2, "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}
    assert [place for place, _ in checkpoints] == names.get(strategy, [])
    if checkpoints:
        folder = written(tmp_path / "again", checkpoints[0][1])
        resumed = make_trainer(output_dir=str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(folder))
        for p, q in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_an_upload_under_way_keeps_its_heads(make_trainer, hub, tmp_path):
    """Trainer leaves a push out while the last one is going on, and its files with it."""
    hub.slow = True
    trainer = make_trainer(push_to_hub=True, hub_model_id="tried")
    finish = trainer._finish_current_push
    trainer._finish_current_push = lambda: [f.set_result(None) for f in hub.pending] and finish()
    trainer.train()
    assert len(hub.sent) == 1
    in_folder, at_first = (
        ConsistencyHeads.from_pretrained(tmp_path / "out" / p)[0] for p in ("cmcv", "checkpoint-2/cmcv")
    )
    assert torch.equal(in_folder.image_out.weight, at_first.image_out.weight)
