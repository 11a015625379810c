"""A training process that is killed (SIGKILL) and started again ends with the weights of one that never was."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmai_fast.mbat import last_checkpoint
from launcher import Launcher, said

SETTINGS: dict[str, Any] = {
    "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "eval_strategy": "steps", "eval_steps": 1, "eval_attack_steps": 1, "inner_steps": 2, "gamma": 0.5, "tau_train": 0.9,
    "eps_warmup": 0.5, "learning_rate": 1e-2, "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    model, processor = make_tiny()
    model.config.text_config.attention_dropout = 0.1  # so that the random state counts
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, launcher: Launcher) -> Callable[..., int]:
    def run(name: str, kill: str = "", **changes: Any) -> int:
        """The exit code of a run; `kill` is where it kills itself, as `kill_at` of one_of_several.py reads it."""
        (code,) = launcher.run(folder, name, SETTINGS | changes, kill=kill)
        assert code in (0, -signal.SIGKILL), said(folder, name)
        return code

    return run


@pytest.fixture(scope="module")
def whole(folder: Path, run: Callable[..., int]) -> dict[str, torch.Tensor]:
    assert run("whole") == 0
    return load_file(folder / "whole.safetensors")


@pytest.mark.parametrize("where, whole_one", [("in step 6", "checkpoint-4"), ("saving step 4", "checkpoint-2")])
def test_a_killed_run_resumes_to_the_very_same_weights(
    make_tiny, folder: Path, run: Callable[..., int], whole: dict[str, torch.Tensor], where: str, whole_one: str
) -> None:
    name = where.replace(" ", "-")
    assert run(name, where) == -signal.SIGKILL
    assert not (folder / f"{name}.safetensors").exists()
    last = last_checkpoint(folder / name)
    assert last is not None and last.name == whole_one
    if where.startswith("saving"):
        assert (folder / name / "checkpoint-4" / "model.safetensors").exists()
    assert run(name, resume_from_checkpoint=str(last)) == 0
    resumed = load_file(folder / f"{name}.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], weight) for key, weight in whole.items())
    start = {f"model.{k}": v.detach().double() for k, v in make_tiny()[0].named_parameters()}
    assert any(not torch.equal(whole[key], weight) for key, weight in start.items())
