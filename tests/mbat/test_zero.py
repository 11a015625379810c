from __future__ import annotations
import json, copy
from pathlib import Path
from typing import Any
import pytest
import torch
from safetensors.torch import load_file
from launcher import Launcher, said

pytest.importorskip("deepspeed")

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.5,
    "inner_steps": 2, "refreshes": 1, "beta": 0.2, "gamma": 0.5, "tau_train": 0.9, "logging_steps": 1,
    "save_steps": 2, "lr_scheduler_type": "constant", "norm": "l2", "eps": 1.0,
    "eval_strategy": "steps", "eval_steps": 2, "eval_attack_steps": 2, "per_device_eval_batch_size": 4,
}

def config(stage):
    return {"zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,"reduce_bucket_size": "auto"},
     "fp16": {"enabled":"auto","loss_scale":0,"loss_scale_window":1000,"initial_scale_power":16,"hysteresis":2,"min_loss_scale":1}, "bf16":{"enabled":"auto"}, "gradient_clipping": "auto",
     "train_micro_batch_size_per_gpu":"auto","train_batch_size":"auto","gradient_accumulation_steps":"auto"}

@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for part in make_tiny():
        part.save_pretrained(folder / "model")
    return folder

@pytest.fixture(scope="module")
def train(folder, launcher):
    def train(name, processes, **changes):
        settings = SETTINGS | {"per_device_train_batch_size": 8 // processes} | changes
        if not (folder / f"{name}.safetensors").exists():
            codes = launcher.run(folder, name, settings, processes)
            assert codes == [0] * processes, f"{codes}:\n{said(folder, name)}"
        return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())
    return train

@pytest.mark.parametrize("stage", [1, 2])
def test_same(train, stage):
    one, one_said = train("one", 1)
    two, two_said = train(f"two{stage}", 2, deepspeed=config(stage))
    worst = max((float((two[k].double() - v.double()).abs().max()), k) for k, v in one.items())
    print(worst)

    assert worst[0] < 1e-5
