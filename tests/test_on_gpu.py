"""The commands and the trainer on a GPU, which they choose themselves, against the CPU: `pytest -m gpu` runs this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cmai_fast.cli import app
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import load_dataset
from cmai_fast.data.sources import DataSource
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows.samples import training_batches, training_samples
from shortened import shorten_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu"),
]


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", ["easyvqa-llava", "easyvqa-llava-immune"])
def test_answers_and_scores_are_those_of_the_cpu(name: str) -> None:
    data = load_dataset("easyvqa", "test", limit=32, seed=0)
    samples = [data[i] for i in range(len(data))]
    there, here = (Pipeline.load(name, device=device) for device in (None, "cpu"))
    assert next(there.model.parameters()).device.type == "cuda"
    (on_gpu, scores_on_gpu), (answers, scores) = there.answer(samples), here.answer(samples)
    assert on_gpu == answers
    torch.testing.assert_close(torch.tensor(scores_on_gpu), torch.tensor(scores), rtol=1e-3, atol=1e-2)


def test_an_attack_breaks_what_it_breaks_on_the_cpu(tmp_path: Path) -> None:
    broken = []
    options = ["--model", "easyvqa-llava", "--data", "easyvqa", "--eps", "8/255", "--limit", "32"]
    for number, device in enumerate(("cpu", "cuda")):
        out = tmp_path / f"{number}.json"
        run("attack", *options, "--device", device, "--out", out)
        broken.append(json.loads(out.read_text())["broken"])
    assert broken[0] > 4 and abs(broken[1] - broken[0]) <= 2


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"]], ids=["float32", "bfloat16"])
def test_immunize_calibrate_guard(tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_checks(monkeypatch)
    data = ["--data", "easyvqa"]
    short = ["--eps", "8/255", "--max-steps", "4", "--limit", "16", "--attack-steps", "2", "--batch-size", "16"]
    run("immunize", "--model", "easyvqa-llava", *data, *short, *options, "--out", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "results.json").read_text())
    run("calibrate", "--model", tmp_path / "a", *data, "--limit", "64", "--out", tmp_path / "heads")
    sample = load_dataset("easyvqa", "test")[0]
    Image.fromarray(sample.images[0]).save(tmp_path / "x.png")
    guard = ["--model", tmp_path / "a", "--heads", tmp_path / "heads"]
    said = run("guard", *guard, "--image", tmp_path / "x.png", "--text", sample.prompt)
    assert isinstance(json.loads(said)["score"], float)


@pytest.mark.parametrize("solver", [{"inner": "pgd"}, {"inner": "bridge", "refreshes": 1}], ids=["pgd", "bridge"])
def test_a_training_step_loses_what_it_loses_on_the_cpu(tmp_path: Path, solver: dict[str, Any]) -> None:
    losses = []
    for use_cpu in (True, False):
        pipeline = Pipeline.load("easyvqa-llava", device="cpu")
        batch = next(training_batches(pipeline, training_samples(DataSource("easyvqa"), "vqa"), 16, 0))
        args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=use_cpu, **solver)
        trainer = MBATTrainer(pipeline.model, args, processing_class=pipeline.processor, heads=pipeline.heads)
        trainer.create_optimizer()
        losses.append(float(trainer.training_step(trainer.model, batch)))
        assert trainer.model.device.type == ("cpu" if use_cpu else "cuda")
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    "solver",
    [{"inner": "pgd"}, {"refreshes": 0}, {"refreshes": 1}, {"objective": "fare", "inner": "pgd"}, {"bf16": True}],
    ids=["pgd", "r0", "r1", "fare", "bf16"],
)
def test_graphs_of_the_vision_side_train_what_its_kernels_train(tmp_path: Path, solver: dict[str, Any]) -> None:
    found = []
    for graphs in (False, True):
        pipeline = Pipeline.load("easyvqa-llava", device="cpu")
        batches = training_batches(pipeline, training_samples(DataSource("easyvqa"), "vqa"), 16, 0)
        args = MBATConfig(
            output_dir=str(tmp_path), report_to="none", beta=0.0, gamma=0.0, arm=False, cuda_graphs=graphs, **solver
        )
        trainer = MBATTrainer(pipeline.model, args, processing_class=pipeline.processor)
        trainer.create_optimizer()
        losses = []
        for _ in range(3):  # a graph reads the weights as they are after each step
            losses.append(float(trainer.training_step(trainer.model, next(batches))))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        assert (trainer._graphs is not None) == graphs
        found.append(losses)
    assert len(set(found[0])) == 3
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=2e-3, atol=1e-4)


def test_cmai_trains_with_graphs_beside_loader_processes_that_pin_memory(tmp_path: Path) -> None:
    data, found = load_dataset("easyvqa", "train", limit=128, seed=0), []
    for graphs in (False, True):
        pipeline = Pipeline.load("easyvqa-llava", device="cpu")
        args = MBATConfig(
            output_dir=str(tmp_path), report_to="none", max_steps=6, per_device_train_batch_size=16, inner_steps=2,
            beta=0.0, arm=False, gamma=1.0, consistency_steps=1, cuda_graphs=graphs, logging_steps=1,
            save_strategy="no", dataloader_num_workers=2, dataloader_pin_memory=True,
        )  # fmt: skip
        heads = Verifier.for_data(pipeline.model, pipeline.processor, data)
        trainer = MBATTrainer(
            pipeline.model, args, train_dataset=data, processing_class=pipeline.processor, heads=heads
        )
        trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(set(found[0])) > 1
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=2e-2, atol=1e-3)
