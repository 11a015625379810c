"""Evaluation, guard and commands with families whose images are tiles or patches."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import processing_utils
from typer.testing import CliRunner

from cmai_fast.arm import Guard
from cmai_fast.attacks import Victim
from cmai_fast.bridge import bridge_of, task_loss
from cmai_fast.cli import app
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.evaluation.pictures import shown
from cmai_fast.evaluation.protocol import measure, own_scores
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.sanity import sanity_checks
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows import training
from cmai_fast.workflows.immunize import ImmunizeSettings, immunize
from processors import GENERATIVE, no_videos, processor_of, samples_of
from shortened import shorten_checks, shorten_training_data

THREAT = ThreatModel("linf", 48 / 255)
PGD = AttackSpec("pgd", 8)
NAMES = ("LLaVA-OneVision", "Qwen2.5-VL", "SmolVLM", "PaliGemma", "InstructBLIP")


def by_name(name):
    return next(f for f in GENERATIVE if f.name == name)


def heads_of(model):
    bridge = bridge_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16).eval()


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return by_name(request.param)


@pytest.fixture(scope="module")
def samples(family):
    return samples_of(family)


@pytest.fixture(scope="module")
def subject(family, samples):
    """Fitted to three samples, so that there is something to break. Leave it as it is."""
    model, processor = copy.deepcopy(family.model()), processor_of(family)
    objective = Victim(bridge_of(model), PixelSpace.from_processor(processor), VQACollator(processor)(samples))
    model_input = objective.space.to_model(objective.pixels())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(60):
        loss = task_loss(*objective.bridge.fuse(objective.encode(model_input), **objective.batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    # As in the files of the hub, where it is the token that ends an answer.
    model.generation_config.eos_token_id = int(objective.batch["labels"][0, -1])
    return Pipeline("undefended", model.eval(), processor, heads_of(model), Threshold(-1.0, 0.05, 100, "calibration"))


@pytest.fixture(scope="module")
def measured(subject, samples):
    return measure(subject, samples, THREAT, [PGD], batch_size=2)


def test_it_is_right_until_it_is_attacked(subject, samples, measured):
    assert measured.record["acc_clean"] == 1.0
    assert subject.generate(samples, measured.runner.images(range(3))) == [s.answer for s in samples]
    attacked = measured.attacked["pgd-8"]
    own, adversarial = measured.runner.images(range(3)), [attacked.images[i] for i in range(3)]
    for clean, adv in zip(own, adversarial, strict=True):
        assert clean.shape == adv.shape and 0 < (clean - adv).abs().max() <= THREAT.eps + 1e-6
    said = subject.generate(samples, adversarial)
    assert attacked.right.tolist() == [a == s.answer for a, s in zip(said, samples, strict=True)]
    assert set(measured.record["s_c"]) == {"clean", "adversarial", "attack", "score"}


def test_samples_may_be_grouped_anew(subject, samples, measured):
    """A sample's images fit it in any batch: alone, with others, in another order."""
    clean = measured.runner.images(range(3))
    scores = own_scores(subject, samples, 3, clean)
    np.testing.assert_allclose(own_scores(subject, samples, 1, clean), scores, atol=1e-5)
    turned = own_scores(subject, samples[::-1], 2, clean[::-1])
    np.testing.assert_allclose(turned[::-1], scores, atol=1e-5)
    again = measure(subject, samples, THREAT, [], transferred={"t": measured.attacked["pgd-8"].images}, batch_size=3)
    assert again.attacked["t"].right.tolist() == measured.attacked["pgd-8"].right.tolist()


def test_the_guard_answers_as_the_subject(subject, samples, measured):
    guard = Guard(subject, threshold=-1.1)
    decisions = guard.decide_batch([s.images[0] for s in samples], [s.prompt for s in samples])
    assert [d.answer for d in decisions] == [s.answer for s in samples]
    scores = own_scores(subject, samples, 3)
    np.testing.assert_allclose([d.score for d in decisions], scores, atol=1e-5)
    asked = f"what is {subject.processor.image_token}?"  # read as text: no second image
    assert guard.decide(samples[0].images[0], asked).question == asked


def test_sanity_checks_and_pictures(subject, samples, measured):
    checks = {c["check"]: c["passed"] for c in sanity_checks(measured, THREAT, must_break=False)}
    assert checks["results do not depend on the batch size"] and checks["gradients are finite"]
    assert checks["random noise is weaker than gradients"]
    pictures = shown("undefended", measured, "pgd-8", THREAT)
    assert len(pictures) == 3
    for picture in pictures:
        picture.ask("undefended", subject)
        assert picture.record["answers"]["undefended"]["clean"] == picture.record["answer"]


@pytest.mark.parametrize("norm, eps", [("linf", 48 / 255), ("l2", 2.0)])
def test_the_noise_of_the_sanity_check_is_in_the_ball_and_on_pixels(subject, samples, measured, monkeypatch, norm, eps):
    seen = []
    judge = Runner._judged
    monkeypatch.setattr(Runner, "_judged", lambda self, r, x, *a, **k: seen.append(x) or judge(self, r, x, *a, **k))
    runner = Runner(subject, samples, batch_size=3)
    runner.noise(ThreatModel(norm, eps), 1)
    (noisy,) = seen
    for moved, clean in zip(noisy, runner.images(range(3)), strict=True):
        own = moved - clean
        size = own.abs().max() if norm == "linf" else own.norm()
        assert 0.5 * eps < size <= eps * (1 + 1e-5)


def test_half_precision(family, samples):
    model = copy.deepcopy(family.model()).bfloat16()
    subject = Pipeline("half", model, processor_of(family), heads_of(model))
    measured = measure(subject, samples, THREAT, [AttackSpec("pgd", 2)], batch_size=2)
    assert measured.record["precision"] == "torch.bfloat16"
    assert all(adv.dtype == torch.float32 for adv in measured.attacked["pgd-2"].images.values())
    assert measured.record["attacks"]["pgd-2"]["nonfinite_gradients"] == 0
    guard = Guard(subject, threshold=-1.1)
    answers = [guard.decide(s.images[0], s.prompt).answer for s in samples]
    assert answers == measured.clean.predictions


def test_images_made_on_another_kind_of_model_are_refused(subject, samples, measured):
    other = "Qwen2.5-VL" if subject.processor is not processor_of(by_name("Qwen2.5-VL")) else "LLaVA-OneVision"
    family = by_name(other)
    images = Runner(Pipeline("other", family.model(), processor_of(family)), samples).images(range(3))
    with pytest.raises(ValueError, match="made on one model fit another only if"):
        measure(subject, samples, THREAT, [], transferred={"transfer": dict(enumerate(images))})


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda line: CliRunner().invoke(app, line.split())


def save(family, folder):
    """As the hub has it; without torchvision a processor of videos has no file to write."""
    family.model().save_pretrained(folder)
    processor = processor_of(family)
    if "video_processor" not in processor.get_attributes():
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)


# Tiles of several sizes, and one image with a Q-Former; a folder of patches is below. What the commands ask of a family
# (its collator, bridge, generation, a training run that saves) has tests of its own for all of them.
@pytest.mark.parametrize("name", ["LLaVA-NeXT", "BLIP-2"])
def test_a_folder_is_immunised_attacked_evaluated_and_guarded(command, tmp_path, monkeypatch, name):
    monkeypatch.setattr(training, "HEAD_STEPS", 2)
    shorten_checks(monkeypatch)
    shorten_training_data(monkeypatch)
    save(by_name(name), tmp_path / "m")
    settings = ImmunizeSettings(
        model="m", max_steps=2, batch_size=2, inner_steps=2, limit=3, attack_steps=2, restarts=1, calibration_samples=4,
        trainable="vision", device="cpu",
    )  # fmt: skip
    immunize(settings, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "report.html").is_file()
    done = command("attack --model run --limit 3 --steps 2 --out a.json --no-progress --dtype bfloat16")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["n"] == 3 and record["precision"] == "torch.bfloat16"
    done = command("evaluate --model run --against m --limit 2 --steps 1 --out e --no-progress")
    assert done.exit_code == 0, done.output
    Image.fromarray(load_dataset("easyvqa", "test", limit=1)[0].images[0]).save(tmp_path / "x.png")
    done = command("guard --model run --image x.png --threshold -99 --text what")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["route"] == "answer"
    assert training.load(replace(settings, dtype="float32"), "m").model.dtype == torch.float32


class VideosBy:
    """What loads each part of a processor, and `load` for that of videos, whether torchvision is there or not."""

    def __init__(self, own, load):
        self.own, self.load = own, load

    def keys(self):
        return self.own.keys()

    def __getitem__(self, part):
        if part == "video_processor":
            return SimpleNamespace(from_pretrained=lambda *args, **kwargs: self.load())
        return self.own[part]


def test_a_folder_whose_processor_reads_videos_too(command, tmp_path, monkeypatch):
    save(by_name("Qwen2.5-VL"), tmp_path / "m")
    line = "attack --model m --limit 4 --steps 2 --batch-size 3 --out a.json --no-progress"
    known, place = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING, "MODALITY_TO_AUTOPROCESSOR_MAPPING"

    def lacking():
        raise ImportError("\nBaseVideoProcessor requires the Torchvision library but it was not found. Install it")

    monkeypatch.setattr(processing_utils, place, VideosBy(known, lacking))
    done = command(line)
    assert done.exit_code == 2 and "requires the Torchvision library" in done.stderr and done.stderr.count("\n") == 1
    monkeypatch.setattr(processing_utils, place, VideosBy(known, no_videos))
    monkeypatch.setattr(processing_utils.ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
    done = command(line)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "a.json").read_text())["n"] == 4
