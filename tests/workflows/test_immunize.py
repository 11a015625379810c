"""Immunising a tiny model: what a run writes, what it refuses, and that no interruption harms it."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import Sample
from cmai_fast.data.sources import DataSource
from cmai_fast.defences import DEFENCES
from cmai_fast.evaluation import comparison
from cmai_fast.evaluation.results import read_results, write_results
from cmai_fast.evaluation.versions import versions
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.pipeline import Pipeline
from cmai_fast.workflows import folder as folders
from cmai_fast.workflows import immunize as workflow
from cmai_fast.workflows import samples as sampled
from cmai_fast.workflows import training
from cmai_fast.workflows.immunize import ImmunizeSettings, immunize
from shortened import shorten


@pytest.fixture(scope="module")
def settings(verified_folder) -> ImmunizeSettings:
    return ImmunizeSettings(
        model=str(verified_folder), defence="mbat", learning_rate=1e-5, max_steps=4, batch_size=4, inner_steps=2,
        attack_steps=2, restarts=1, limit=8, save_steps=1, calibration_samples=16, command="cmai-fast immunize",
    )  # fmt: skip


def record(name, role):
    return {"name": name, "role": role, "acc_clean": 1.0, "acc_robust": 0.5, "n": 8}


@pytest.fixture
def light(monkeypatch):
    """Stands in for what follows training, which the test at hand is not about."""
    models = [record("undefended", "undefended"), record("immunised", "immunised")]
    monkeypatch.setattr(workflow.comparison, "compare", lambda *a, **k: {"models": models, "pictures": []})
    monkeypatch.setattr(workflow, "step_overhead", lambda *a, **k: {"time_ratio": 2.0, "memory_ratio": 1.0})


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    """One run never interrupted, with its full evaluation. Look, do not touch."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        immunize(settings, out, progress=False)
    return out


def test_a_run_with_graphs_goes_through_all_its_stages(settings, tmp_path, monkeypatch):
    """What runs where a GPU captures them, with what would be captured in their place."""
    captured = []

    def of(self, bridge, model_input):
        captured.append(tuple(model_input.shape))
        return bridge.encode_image

    monkeypatch.setattr(MBATConfig, "can_capture", True)
    monkeypatch.setattr("cmai_fast.mbat.trainer.check_graphs", lambda trainer: None)
    monkeypatch.setattr("cmai_fast.bridge.graphs.EncoderGraphs.of", of)
    shorten(monkeypatch)
    cmai = replace(settings, defence="cmai", max_steps=2)
    results = immunize(cmai, tmp_path / "out", progress=False)
    assert captured and results["overhead"]["time_ratio"] > 0 and results["settings"]["anchor"] == 1.0
    eager = immunize(replace(cmai, cuda_graphs=False), tmp_path / "eager", progress=False)
    assert eager["training"]["loss"] == results["training"]["loss"]


def training_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["training"]


def weights(out: Path) -> tuple[bytes, bytes]:
    return (out / "model" / "model.safetensors").read_bytes(), (out / "cmcv" / "verifier.safetensors").read_bytes()


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_a_run_leaves(finished, settings):
    assert {p.name for p in finished.iterdir()} == {"model", "cmcv", "results.json", "report.html"}
    AutoModelForImageTextToText.from_pretrained(finished / "model", use_safetensors=True)
    AutoProcessor.from_pretrained(finished / "model")
    threshold = Pipeline.load(finished).threshold
    assert (threshold.split, threshold.samples, threshold.false_rejection_rate) == ("calibration", 16, 0.05)
    original = Path(settings.model).parent
    assert weights(finished)[0] != (original / "model" / "model.safetensors").read_bytes()
    assert weights(finished)[1] != (original / "cmcv" / "verifier.safetensors").read_bytes()
    assert "<html" in (finished / "report.html").read_text()


def test_results_are_complete(finished, settings):
    results = read_results(finished)
    before, after = results["models"]
    assert (before["name"], before["role"], before["path"]) == ("undefended", "undefended", settings.model)
    assert (after["name"], after["role"], after["path"]) == ("immunised", "immunised", str(finished / "model"))
    for r in (before, after):
        assert r["n"] == 6 and r["precision"] == "torch.float32"
        assert {
            "acc_clean",
            "acc_robust",
            "asr",
            "acc_robust_8bit",
            "acc_clean_interval",
            "acc_robust_interval",
        } <= set(r)
        assert r["acc_robust"] <= r["acc_clean"]
        assert r["attacks"]["pgd-2"]["attacked"] == round(6 * r["acc_clean"]) > 0
        for part, n in (("clean", 6), ("adversarial", r["attacks"]["pgd-2"]["attacked"])):
            assert np.isfinite(r["s_c"][part]["mean"])
            assert list(r["s_c"][part]["quantiles"]) == ["0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99"]
            assert sum(r["s_c"][part]["histogram"]["counts"]) == n
        assert {"auroc", "tpr_at_1_fpr", "tpr_at_5_fpr", "roc", "threshold", "acc_robust_with_rejection"} <= set(
            r["detection"]
        )
        assert {p["eps"] for p in r["curve"]} == {e / 255 for e in (2, 8, 16)}
        assert {"pgd-2", "apgd-4"} <= set(r["attacks"]) and r["attacks"]["pgd-2"]["passes"]["forward"] > 0
        assert all({"check", "passed", "detail"} == set(c) for c in r["sanity"]) and len(r["sanity"]) >= 6
    assert "transfer" in after["attacks"] and "transfer" not in before["attacks"]
    assert before["detection"]["threshold"] == -99.0  # that of the original verifier
    assert before["s_c"] != after["s_c"]
    assert results["overhead"]["time_ratio"] > 0 and results["overhead"]["memory_ratio"] > 0
    expected = asdict(training.resolved(settings)) | {"split": "test"}  # what is measured on
    assert {k: results["settings"][k] for k in expected} == expected
    assert {"cmai_fast", "torch", "transformers", "python", "commit", "device", "easy_vqa"} <= set(results["versions"])
    assert results["seed"] == 0 and len(results["sample_ids"]) == 6
    curves = results["training"]
    assert curves["step"] == [1, 2, 3, 4] and curves["passes"]["vision_forward"] == 8
    for curve in (
        "loss", "loss_clean", "loss_adv", "loss_contrastive", "s_c_clean", "s_c_adv", "beta", "eps", "lam",
        "arm_level", "arm_mean", "arm_variance",
    ):  # fmt: skip
        assert len(curves[curve]) == 4 and all(np.isfinite(curves[curve]))


def test_the_undefended_model_is_measured_with_its_own_verifier(settings, tmp_path, monkeypatch, light):
    """Training must not reach the verifier that the model came with."""
    seen = {}

    def look(entries, *args, **how):
        seen.update({e.name: copy.deepcopy(e.load().verifier.network.state_dict()) for e in entries})
        return {"models": [record(e.name, e.role) for e in entries], "pictures": []}

    monkeypatch.setattr(comparison, "compare", look)
    immunize(settings, tmp_path / "out", progress=False)
    original = Pipeline.load(settings.model).verifier.network.state_dict()
    assert all(torch.equal(v, original[k]) for k, v in seen["undefended"].items())
    assert not all(torch.equal(v, original[k]) for k, v in seen["immunised"].items())


def kill_after(step: int, monkeypatch, error: BaseException) -> None:
    train_step = MBATTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(MBATTrainer, "training_step", interrupted)


def test_ctrl_c_leaves_a_run_that_goes_on_exactly(settings, finished, tmp_path, monkeypatch, light):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_after(2, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            immunize(settings, out, progress=False)
    assert not (out / "model").exists() and not (out / "results.json").exists()
    torch.rand(7)
    results = immunize(replace(settings, command="cmai-fast immunize --resume"), out, resume=True, progress=False)
    assert weights(out) == weights(finished)
    whole = training_of(finished)
    assert results["training"]["resumed"] and not whole["resumed"]
    for key in ("step", "loss", "loss_clean", "loss_adv", "loss_contrastive", "s_c_adv", "beta", "passes"):
        assert results["training"][key] == whole[key], key


def test_a_model_without_a_verifier_goes_on_with_the_same_one(make_tiny, settings, tmp_path, monkeypatch, light):
    model, processor = make_tiny()
    model.save_pretrained(tmp_path / "bare")
    processor.save_pretrained(tmp_path / "bare")
    monkeypatch.setattr(training, "HEAD_STEPS", 3)
    settings = replace(settings, model=str(tmp_path / "bare"))
    immunize(settings, tmp_path / "whole", progress=False)
    torch.manual_seed(99)
    with monkeypatch.context() as patch:
        kill_after(0, patch, KeyboardInterrupt())  # before the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            immunize(settings, tmp_path / "out", progress=False)
    torch.manual_seed(98)
    immunize(settings, tmp_path / "out", resume=True, progress=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_kill_9_in_mid_training(settings, finished, tmp_path, monkeypatch, light):
    out = tmp_path / "out"
    child = os.fork()
    if not child:
        try:
            step = MBATTrainer.training_step

            def killed(self, *args, **kwargs):
                if self.state.global_step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, *args, **kwargs)

            MBATTrainer.training_step = killed
            immunize(settings, out, progress=False)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (out / "model").exists()
    assert {p.name for p in (out / "state" / "checkpoints").iterdir()} >= {"checkpoint-2", "checkpoint-3"}
    with pytest.raises(ValueError, match="unfinished run; continue it with --resume"):
        immunize(settings, out, progress=False)
    immunize(settings, out, resume=True, progress=False)
    assert weights(out) == weights(finished)


@pytest.mark.parametrize("what", ["model", "verifier", "results", "report"])
def test_a_full_disk_leaves_nothing_half_written(settings, finished, tmp_path, monkeypatch, light, what):
    out, full = tmp_path / "out", OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if what == "model":
            whole_save = PreTrainedModel.save_pretrained

            def half(self, folder, *args, **kwargs):
                whole_save(self, folder, *args, **kwargs)
                if "checkpoint" not in str(folder):
                    with open(Path(folder) / "model.safetensors", "r+b") as file:
                        file.truncate(1000)
                    raise full

            patch.setattr(PreTrainedModel, "save_pretrained", half)
        elif what == "verifier":
            save_verifier = Verifier.save_pretrained

            def no_verifier(self, folder, threshold=None):
                if threshold is not None:
                    raise full
                save_verifier(self, folder, threshold)

            patch.setattr(Verifier, "save_pretrained", no_verifier)
        elif what == "results":
            write = os.replace

            def no_replace(source, target):
                if Path(target).name == "results.json":
                    raise full
                write(source, target)

            patch.setattr(os, "replace", no_replace)
        else:
            patch.setattr(folders, "write_report", lambda *a: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match=r"No space left|could not write"):
            immunize(settings, out, progress=False)
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    if what in ("model", "verifier"):
        assert not (out / "model").exists() and not (out / "results.json").exists()
    if what == "report":  # nothing else is done again
        monkeypatch.setattr(comparison, "compare", lambda *a, **k: 1 / 0)
    immunize(settings, out, resume=True, progress=False)
    assert weights(out) == weights(finished)
    assert (out / "report.html").is_file() and (out / "results.json").is_file()
    assert not list(out.glob("checkpoint-*"))


def test_folders_that_are_not_this_run_are_refused_untouched(settings, finished, tmp_path):
    cases = {}
    for resume in (False, True):
        foreign = tmp_path / f"foreign{resume}"
        foreign.mkdir()
        (foreign / "thesis.tex").write_text("years of work")
        cases[foreign, resume] = "exists and is not empty"
        other = tmp_path / f"other{resume}"
        other.mkdir()
        (other / "state").mkdir()
        (other / "state" / "run.json").write_text('["someone else\'s"]')
        cases[other, resume] = "is damaged; delete" if resume else "holds an unfinished run"
        file = tmp_path / f"file{resume}"
        file.write_text("x")
        cases[file, resume] = "exists and is not empty"
    cases[finished, False] = "holds a finished run"
    before = {folder: listing(folder) for folder, _ in cases}
    for (folder, resume), message in cases.items():
        with pytest.raises(ValueError, match=message):
            immunize(settings, folder, resume=resume, progress=False)
    immunize(settings, finished, resume=True, progress=False)
    assert {folder: listing(folder) for folder, _ in cases} == before


def test_resume_names_the_settings_that_changed(settings, tmp_path):
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    began = asdict(training.resolved(settings)) | {"data_fingerprint": settings.source.fingerprint()}
    write_results(began, out / "state" / "run.json")
    before = listing(out)
    changed = replace(settings, eps=4 / 255, seed=1, command="other words", cuda_graphs=False)
    with pytest.raises(ValueError, match=r"eps was 0\.03\d*, now 0\.01\d*; seed was 0, now 1\); resume with the same"):
        immunize(changed, out, resume=True, progress=False)
    assert listing(out) == before


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model": "no-such-model"}, "unknown model 'no-such-model'"),
        ({"data": "no-such-data"}, "unknown data 'no-such-data'"),
        ({"eps": 8.0}, "did you mean 8/255"),
        ({"inner": "pdg"}, "inner is 'pdg'"),
        ({"refreshes": 3}, "refreshes is 3; expected 0 to 2"),
        ({"eps_warmup": 2.0}, "eps_warmup is 2.0"),
        ({"cuda_graphs": True}, "cuda_graphs is True, and the device is cpu"),
        ({"anchor": 1.0}, "consistency_steps is 0 and anchor 1.0"),
    ],
)
def test_bad_input_is_refused_before_the_folder_is_claimed(settings, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        immunize(replace(settings, **wrong), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["max_steps", "batch_size", "attack_steps", "restarts", "limit", "save_steps"])
def test_counts_are_whole_numbers(settings, name):
    for value in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected a whole number of at least 1"):
            replace(settings, **{name: value})
    with pytest.raises(ValueError, match="learning_rate is nan"):
        replace(settings, learning_rate=float("nan"))


def test_a_folder_of_adapters_is_no_whole_model(settings, model_folder, tmp_path):
    """Loaded, its LoRA matrices are frozen: training would move `modules_to_save` alone."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]))
    model.save_pretrained(tmp_path / "adapters")
    AutoProcessor.from_pretrained(model_folder).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match=r"adapters holds adapters, which come frozen.*merge_and_unload"):
        immunize(replace(settings, model=str(tmp_path / "adapters")), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_pickled_weights_are_not_read(make_tiny, settings, tmp_path):
    model, processor = make_tiny()
    model.save_pretrained(tmp_path / "pickled")
    processor.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load the model .*safetensors"):
        immunize(replace(settings, model=str(tmp_path / "pickled")), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_an_error(model_folder, tmp_path):
    for fault in ("truncated", "incomplete"):
        shutil.copytree(model_folder, tmp_path / fault)
    with open(tmp_path / "truncated" / "model.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match="cannot load the model"):
        Pipeline.load(str(tmp_path / "truncated"))
    names = load_file(tmp_path / "incomplete" / "model.safetensors")
    names.pop(next(k for k in names if "multi_modal_projector" in k))
    save_file(names, tmp_path / "incomplete" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['model.multi_modal_projector"):
        Pipeline.load(str(tmp_path / "incomplete"))


def test_without_heads_there_is_no_detector(settings, tmp_path, light):
    plain = replace(settings, beta=0.0, gamma=0.0, arm=False)
    immunize(plain, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "model").is_dir() and not (tmp_path / "out" / "cmcv").exists()


def test_training_runs_where_evaluation_does(settings, tmp_path, monkeypatch):
    assert training.training_arguments(replace(settings, device="cpu"), tmp_path).use_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training.training_arguments(replace(settings, device="cpu"), tmp_path).use_cpu
    settings = training.resolved(settings)
    monkeypatch.setattr(training, "resolved", lambda same: same)
    monkeypatch.setattr(training, "MBATConfig", lambda **arguments: SimpleNamespace(**arguments, can_capture=True))
    for device, graphs in product(("cuda", None), (None, True, False)):
        asked = training.training_arguments(replace(settings, device=device, cuda_graphs=graphs), tmp_path)
        assert asked.use_cpu is False and asked.cuda_graphs == (graphs is not False)
    with pytest.raises(ValueError, match=r"device is 'cuda:1'.*CUDA_VISIBLE_DEVICES=1"):
        training.training_arguments(replace(settings, device="cuda:1"), tmp_path)


def test_training_batches_depend_on_the_seed_alone(model_folder):
    subject, data = Pipeline.load(str(model_folder)), sampled.training_samples(DataSource("easyvqa"), "vqa")

    def ids(seed):
        stream = sampled.training_batches(subject, data, 4, seed)
        return torch.stack([next(stream)["sample_ids"] for _ in range(2)])

    assert torch.equal(ids(0), ids(0)) and not torch.equal(ids(0), ids(1))


def test_versions_without_git(monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert versions()["commit"] == "not a checkout"


class Open:
    """A source whose answers are open: no sample has choices."""

    name = "open"

    def load(self, split, limit=None, seed=0):
        return [Sample(i, ("x.png",), f"what is {i}?", (a,)) for i, a in enumerate(("a cat", "a dog", "A cat", "rain"))]


def test_wrong_answers_come_from_other_samples_where_there_are_no_choices():
    samples = sampled.training_samples(Open(), "vqa")
    assert len(samples) == 4
    assert (samples[0].choices[0], set(samples[0].choices)) == ("a cat", {"a cat", "a dog", "rain"})
    assert samples[3].choices[0] == "rain" and len(samples[3].choices) == 3


def test_prompts_are_those_of_the_task(monkeypatch):
    task = SimpleNamespace(prompt=lambda s: f"Answer shortly: {s.prompt}", wrong_answers=lambda s, o: ("x",))
    monkeypatch.setitem(sampled.TASKS._things, "short", task)
    assert sampled.asked(Open(), "test", "short")[1].prompt == "Answer shortly: what is 1?"
    assert sampled.training_samples(Open(), "short")[1].prompt == "Answer shortly: what is 1?"


def test_a_sample_without_an_answer_is_named(monkeypatch):
    monkeypatch.setattr(Open, "load", lambda *a, **k: [Sample("s7", (), "?")])
    with pytest.raises(ValueError, match=r"1 of 1 samples have no answer.*s7"):
        sampled.asked(Open(), "test", "vqa")


def test_a_defence_sets_what_the_user_left(settings, monkeypatch, tmp_path):
    values = {"inner": "pgd", "trainable": "vision", "beta": 0.0, "weight_decay": 0.1, "muon": True}
    monkeypatch.setattr(DEFENCES, "check", lambda name: None)
    monkeypatch.setattr(training, "DEFENCES", {"planted": SimpleNamespace(values=values)})
    chosen = training.resolved(replace(settings, defence="planted", beta=0.7))
    assert (chosen.inner, chosen.trainable, chosen.beta, chosen.lam, chosen.muon) == ("pgd", "vision", 0.7, 0.5, True)
    assert training.resolved(chosen) == chosen
    args = training.training_arguments(replace(settings, defence="planted", beta=0.7), tmp_path)
    assert (args.inner, args.trainable, args.beta, args.weight_decay) == ("pgd", "vision", 0.7, 0.1)
    assert args.muon


def test_the_users_norm_holds_beside_that_of_a_defence(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "DEFENCES", {"planted": SimpleNamespace(values={"norm": "linf"})})
    planted = replace(settings, defence="planted", norm="l2", eps=1.0)
    assert training.training_arguments(planted, tmp_path).norm == "l2"


def test_what_only_arm_reads_is_refused_without_it(settings, tmp_path):
    """cmai, the default, is without ARM: a bound of eps would go unheard."""
    chosen = replace(settings, defence="cmai", eps_max=16 / 255)
    with pytest.raises(ValueError, match=r"eps_max is 0.06.* arm is False \(that of defence 'cmai'.* \(--arm\)"):
        training.training_arguments(chosen, tmp_path)
    assert training.training_arguments(replace(chosen, arm=True), tmp_path).eps_max == 16 / 255
    assert training.training_arguments(replace(chosen, defence="mbat"), tmp_path).eps_max == 16 / 255


def test_steps_on_consistency_alone_have_a_curve():
    logged = [{"step": 2, "loss_clean": 1.0, "loss": 1.5, "loss_consistency": 0.5}, {"step": 2, "train_runtime": 3.0}]
    curves = training._curves(SimpleNamespace(state=SimpleNamespace(log_history=logged)))
    assert curves == {"step": [2], "loss": [1.5], "loss_clean": [1.0], "loss_consistency": [0.5]}


def test_what_is_said_holds_where_it_is_the_usual_value(settings):
    """10 steps are MBAT's own number, and cmai has 4: whoever asks for 10 gets 10."""
    assert training.resolved(replace(settings, defence="cmai", inner_steps=None)).inner_steps == 4
    assert training.resolved(replace(settings, defence="cmai", inner_steps=10)).inner_steps == 10


def test_the_defence_of_a_model_that_writes_its_answers(settings):
    chosen = training.resolved(replace(settings, defence=None, inner_steps=None))
    assert (chosen.defence, chosen.consistency_steps, chosen.inner_steps, chosen.gamma) == ("cmai", 5, 4, 1.0)
    assert training.resolved(replace(settings, model="photo-dual-encoder", defence=None)).defence == "mbat"
    with pytest.raises(ValueError, match="nosuch"):
        training.resolved(replace(settings, model="nosuch", defence=None))
    with pytest.raises(ValueError, match="unknown defence ''"):
        training.resolved(replace(settings, defence=""))
