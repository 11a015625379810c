"""Attacks on the uploaded picture: the processor of every family, followed pixel by pixel."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.attacks.upload import UploadVictim
from cmai_fast.bridge import bridge_of
from cmai_fast.data import Sample, load_dataset
from cmai_fast.data.choices import ChoiceCollator, choices_of
from cmai_fast.data.collators import collator_of
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.runner import Runner
from cmai_fast.models import resolve
from cmai_fast.pipeline import Pipeline
from cmai_fast.pixels import PixelSpace, round_to_8bit
from cmai_fast.preprocessing.jpeg import jpeg
from cmai_fast.threat import SURFACES, Surface, ThreatModel
from cmai_fast.workflows.attack import attack
from families import FAMILIES, picture
from processors import SAMPLES, processor_of, tokenizer

SIZES = ((50, 70), (57, 33), (24, 24))
EPS = ThreatModel("linf", 8 / 255, Surface("upload"))
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
by_name = {family.name: family for family in FAMILIES}


@functools.cache
def parts(name: str) -> tuple[Any, PixelSpace, Any, list[Sample]]:
    """Bridge, pixel space, collator, and samples with pictures of different sizes, shared: leave them as they are."""
    family = by_name[name]
    processor = SimpleNamespace(image_processor=family.processor, tokenizer=tokenizer())
    if family.kind == "generative":
        processor = processor_of(family)
    bridge = bridge_of(family.model())
    samples = [replace(s, images=(picture(i, *size),)) for i, (s, size) in enumerate(zip(SAMPLES, SIZES, strict=True))]
    if family.kind == "encoder-decoder":
        samples = [replace(s, prompt="") for s in samples]
    collate = (
        ChoiceCollator(processor, choices_of(samples)) if family.kind == "dual" else collator_of(bridge, processor)
    )
    return bridge, PixelSpace.from_processor(processor), collate, samples


def victim(name: str, rows: list[int] | None = None, surface: str = "upload") -> UploadVictim:
    bridge, space, collate, samples = parts(name)
    own = samples if rows is None else [samples[i] for i in rows]
    return UploadVictim(bridge, space, collate, own, surface=Surface.parse(surface))


def of_pictures(name: str, pictures: list[np.ndarray]) -> torch.Tensor:
    """What the family's processor makes of the samples with these pictures, in [0, 1]."""
    bridge, space, collate, samples = parts(name)
    assert 0 < (result.adv - clean).abs().max() <= EPS.eps + 1e-6
    assert not result.adv[~attacked._mask.unsqueeze(2).expand_as(clean)].any(), "no padding"


def test_jpeg_is_in_the_loop():
    through = victim("Qwen2-VL", surface="upload:jpeg=40")
    clean = through.pixels().requires_grad_()
    made = through.seen.layout.only(through._units(clean))
    real = of_pictures("Qwen2-VL", [jpeg(s.images[0], 40) for s in through.samples])
    assert (made - real).abs().max() * 255 < 2.1
    assert (torch.autograd.grad(through(clean).loss.sum(), clean)[0] != 0).any()


def test_a_processor_that_is_no_linear_map_is_refused_by_name():
    deviates = r"deviates by \d+\.\d of 255 levels"

    class Gamma(type(by_name["LLaVA"].processor)):
        def rescale(self, image, scale, **kwargs):
            return super().rescale(255 * (np.asarray(image) / 255) ** 0.8, scale, **kwargs)

    class Posterised(type(by_name["LLaVA"].processor)):
        def resize(self, image, size, **kwargs):
            return super().resize(image, size, **kwargs) // 64 * 64

    class Dimmed(type(by_name["LLaVA"].processor)):
        def normalize(self, image, mean, std, **kwargs):
            bright = np.where(np.asarray(image) < 1, image * 0.9, image)  # not where coordinates are
            return super().normalize(bright, mean, std, **kwargs)

    bridge, space, collate, samples = parts("LLaVA")
    for kind, what in ((Gamma, "changes their colours"), (Posterised, deviates), (Dimmed, deviates)):
        own = kind(**{k: v for k, v in by_name["LLaVA"].processor.to_dict().items() if k != "image_processor_type"})
        other = UploadVictim(bridge, space, collate.with_pictures_by(own), samples)
        with pytest.raises(ValueError, match=f"{kind.__name__}.*{what}"):
            other(other.pixels())
    with pytest.raises(ValueError, match="no sample of the batch has a picture"):
        UploadVictim(bridge, space, collate, [replace(samples[0], images=())])


def answers(folder: Path, model: str) -> list[str]:
    """Of plain transformers to the pictures of a manifest, opened by Pillow."""
    path, said = resolve(model), []
    plain, processor = tf.AutoModelForImageTextToText.from_pretrained(path), tf.AutoProcessor.from_pretrained(path)
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
        text = processor.apply_chat_template(ask, add_generation_prompt=True)
        inputs = processor(images=Image.open(folder / row["files"][0]), text=text, return_tensors="pt")
        output = plain.generate(**inputs, max_new_tokens=16, do_sample=False)
        said.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


def test_a_saved_picture_gives_plain_transformers_the_same_answer(tmp_path):
    data = load_dataset("easyvqa", "test", limit=6, seed=0)
    records, sizes = [], ((140, 100), (90, 120), (64, 64), (50, 40))
    for i in range(6):
        read_picture(data[i].images[0]).resize(sizes[i % 4]).save(tmp_path / f"{i}.png")
        records.append({"id": i, "image": f"{i}.png", "question": data[i].prompt, "answer": data[i].answer})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for kind, surface in enumerate(("upload", "upload:jpeg=75")):
        record = attack(
            "easyvqa-llava", DataSource(str(tmp_path / "own.jsonl")), "pgd",
            ThreatModel("linf", 16 / 255, Surface.parse(surface)), steps=8, out=tmp_path / f"{kind}.json",
            save_images=tmp_path / str(kind), batch_size=4, progress=False,
        )  # fmt: skip
        rows = [json.loads(line) for line in (tmp_path / str(kind) / "manifest.jsonl").read_text().splitlines()]
        assert record["settings"]["threat"] == surface == rows[0]["threat"]
        assert record["acc_robust"] == record["acc_robust_8bit"]
        assert record["acc_clean"] > 0.8 and record["asr"] > 0.3, "the undefended model breaks"
        assert [row["broken"] for row in rows] == [
            not s["right_adv_8bit"] for s in record["per_sample"] if s["attacked"]
        ]
        for row in rows:
            own, saved = (Image.open(tmp_path / f) for f in (f"{row['id']}.png", f"{kind}/{row['files'][0]}"))
            assert saved.size == own.size and saved.format == ("PNG" if kind == 0 else "JPEG")
            if kind == 0:
                assert np.abs(np.asarray(saved).astype(int) - np.asarray(own)).max() <= 16
        assert answers(tmp_path / str(kind), "easyvqa-llava") == [row["adversarial_prediction"] for row in rows]
