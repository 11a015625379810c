"""The bundled models as a stranger meets them: by plain `transformers`, without this library."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.data import load_dataset
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.surface import victim_of
from cmai_fast.models import BUNDLED, resolve
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.samples import asked

GENERATIVE = [name for name in BUNDLED if name != "photo-dual-encoder"]  # that one: tests/models/test_photos.py

PLAIN = """
import sys
import easy_vqa
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

questions, answers, images = easy_vqa.get_test_questions()
paths, rows = easy_vqa.get_test_image_paths(), range(0, 9673, 194)
chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[i]}]}] for i in rows]
pictures = [Image.open(paths[images[i]]).convert("RGB") for i in rows]
for folder in sys.argv[1:]:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    print(sum(s.strip() == answers[i] for s, i in zip(said, rows)), len(rows), folder)
assert "cmai_fast" not in sys.modules
"""


def test_the_bundled_models_answer_by_plain_transformers() -> None:
    folders = [str(resolve(name)) for name in GENERATIVE]
    run = subprocess.run(  # one for all: its imports take longer than the answers
        [sys.executable, "-c", PLAIN, *folders], capture_output=True, text=True, check=True, timeout=300
    )
    counts = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    assert [folder for *_, folder in counts] == folders
    for right, count, folder in counts:
        assert int(count) == 50
        # The whole test split is measured by the recipes; fifty questions would catch a wrong file or processor.
        assert int(right) >= 45, folder


def test_each_task_has_a_model_that_answers_and_breaks() -> None:
    tasks = {"easyvqa": "vqa", "easyvqa-captions": "captioning", "easyvqa-pairs": "reasoning"}
    pipeline = Pipeline.load("easyvqa-llava-tasks")
    for data, task in tasks.items():
        samples = asked(DataSource(data), "test", task, 40)
        measured = measure(pipeline, samples, ThreatModel("linf", 16 / 255), [AttackSpec("pgd", 10)], task=task)
        assert measured.record["acc_clean"] >= 0.75 and measured.record["asr"] >= 0.25, data


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_bundled_model_is_small_and_safe_and_may_have_a_guard(name: str) -> None:
    folder = resolve(name)
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12 * 2**20
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    pipeline = Pipeline.load(name)
    assert 1e6 <= sum(p.numel() for p in pipeline.model.parameters()) <= 3e6
    assert pipeline.guarded == (name in ("easyvqa-llava", "easyvqa-llava-immune"))
    assert pipeline.threshold is None or pipeline.threshold.split == "calibration"


def test_the_undefended_model_breaks_and_the_immunised_one_stands() -> None:
    eps, data, robust = 16 / 255, load_dataset("easyvqa", "test", 48), {}
    for name in ("easyvqa-llava", "easyvqa-llava-immune"):
        pipeline = Pipeline.load(name)
        batch = pipeline.collate([data[i] for i in range(len(data))])
        victim = victim_of(pipeline, batch)
        clean = victim.pixels()
        result = ATTACKS["pgd"](victim, clean, ThreatModel("linf", eps), steps=20, sample_ids=batch["sample_ids"])
        right = victim.right(clean)
        assert right.float().mean() > 0.9
        robust[name] = (right & ~result.fooled).float().mean()
        noise = clean + torch.empty_like(clean).uniform_(-eps, eps, generator=torch.Generator().manual_seed(0))
        assert victim.right(noise.clamp(0, 1)).float().mean() > 0.8
    assert robust["easyvqa-llava"] < 0.5
    assert robust["easyvqa-llava-immune"] > 0.8
