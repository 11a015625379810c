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
    moved = [replace(s, images=(Image.fromarray(p),)) for s, p in zip(samples, pictures, strict=True)]
    return Victim(bridge, space, collate(moved)).pixels()


@every_family
def test_the_processor_is_followed_to_the_level_and_so_is_its_derivative(family):
    """Pictures without extremes, so that nothing is cut off where bicubic weights overshoot."""
    rng = np.random.default_rng(3)
    calm = [rng.integers(90, 160, (*size, 3), dtype=np.uint8) for size in SIZES]
    bump = [np.zeros((*size, 3), np.uint8) for size in SIZES]
    for place, change in zip(((10, 30), (40, 5), (9, 9)), bump, strict=True):
        change[place[0] : place[0] + 12, place[1] : place[1] + 12] = rng.integers(0, 60, (12, 12, 3))
    bridge, space, collate, samples = parts(family.name)
    followed = UploadVictim(
        bridge, space, collate, [replace(s, images=(p,)) for s, p in zip(samples, calm, strict=True)]
    )
    real = of_pictures(family.name, calm)
    x = followed.pixels().requires_grad_()
    units = followed.units(x)
    own = followed.seen.layout
    made = units if own is None else own.only(units)
    apart = (made - real).abs() * 255
    assert apart.max() < 2.1 and (apart > 0.5).float().mean() < 0.05
    # Along the change, for each sample: the derivative against the real processor's difference.
    way = torch.from_numpy(rng.normal(size=real.shape)).float() + 2
    (gradient,) = torch.autograd.grad((made * way).sum(), x)
    moved = followed.from_pictures([[change] for change in bump])
    predicted = (gradient * moved).flatten(1).sum(1)
    happened = (of_pictures(family.name, [a + b for a, b in zip(calm, bump, strict=True)]) - real) * way
    happened = happened.flatten(1).sum(1)
    assert (happened.abs() > 1).all()
    torch.testing.assert_close(predicted, happened, rtol=0.05, atol=0.1)


@every_family
def test_an_attack_stays_in_the_ball_in_8_bits_and_does_not_depend_on_the_batch(family):
    whole = victim(family.name)
    clean = whole.pixels()
    whole.exact = False  # all steps
    run = functools.partial(ATTACKS["pgd"], steps=3, seed=5)
    result = run(whole, clean, EPS, sample_ids=torch.arange(3))
    assert not result.zero_gradients.any() and not result.nonfinite.any()
    with torch.no_grad():
        before = whole(clean).loss
    assert (result.loss >= before - 1e-6).all() and (result.loss > before).any()
    for row, (adv, own) in enumerate(zip(whole.split(result.adv), whole.split(clean), strict=True)):
        assert adv.shape == (1, 3, *SIZES[row]) and 6 / 255 < (adv - own).abs().max() <= EPS.eps + 1e-6
        assert ((adv - own).abs() > 0).float().mean() > 0.9, "every pixel, also of the picture beside a larger one"
    pictures = whole.pictures(round_to_8bit(result.adv, clean, EPS))
    for row, (several, sample) in enumerate(zip(pictures, whole.samples, strict=True)):
        (saved,) = several
        assert saved.dtype == np.uint8 and saved.shape == (*SIZES[row], 3)
        assert np.abs(saved.astype(int) - sample.images[0]).max() <= 8
    alone = victim(family.name, [1])
    alone.exact = False
    own = run(alone, alone.pixels(), EPS, sample_ids=torch.tensor([1]))
    assert (alone.pictures(own.adv)[0][0] != whole.pictures(result.adv)[1][0]).mean() < 0.01


def test_an_l2_ball_is_that_of_the_picture_whatever_its_size():
    attacked, threat = victim("LLaVA-NeXT"), ThreatModel("l2", 4.0, Surface("upload"))
    clean, attacked.exact = attacked.pixels(), False
    result = ATTACKS["apgd"](attacked, clean, threat, steps=3)
    rounded = round_to_8bit(result.adv, clean, threat)
    for adv, own in zip(attacked.split(rounded), attacked.split(clean), strict=True):
        assert (adv - own).norm() <= 4.0 + 1e-5
    assert (threat.distance(rounded - clean) > 3.5).any()


def test_several_pictures_of_different_sizes_in_a_sample():
    bridge, space, collate, samples = parts("Idefics3")
    two = replace(samples[0], images=(picture(4, 30, 44), picture(5, 50, 28)))
    both = UploadVictim(bridge, space, collate, [two, samples[1]])
    clean = both.pixels()
    (gradient,) = torch.autograd.grad(both(clean.requires_grad_()).loss.sum(), clean)
    reached = [[(gradient[0, k, :, :h, :w] != 0).float().mean() for k, (h, w) in enumerate(((30, 44), (50, 28)))]]
    assert min(reached[0]) > 0.99
    assert (gradient != 0).sum() <= both._mask.sum() * 3, "none where there is no picture"
    for several, sample in zip(both.pictures(clean), both.samples, strict=True):
        assert [p.tolist() for p in several] == [p.tolist() for p in sample.images]


def test_a_patch_moves_its_square_alone_and_reads_what_is_around_it():
    name, surface = "LLaVA-NeXT", "patch:size=0.5,x=1,y=0"
    attacked = victim(name, surface=surface)
    clean = attacked.pixels()
    threat = ThreatModel.parse("linf", None, Surface.parse(surface))
    assert threat.eps == 1
    result = ATTACKS["pgd"](attacked, clean, threat, steps=3, early_stop=False)
    pictures = attacked.pictures(round_to_8bit(result.adv, clean, threat))
    for sample, (made,) in zip(attacked.samples, pictures, strict=True):
        own, side = sample.images[0], round(min(sample.images[0].shape[:2]) / 2)
        changed = (made != own).any(-1)
        assert changed[:side, -side:].mean() > 0.9 and changed.sum() == changed[:side, -side:].sum()
        assert np.abs(made.astype(int) - own).max() > 100
    shown = [several[0] for several in pictures]
    real, made = of_pictures(name, shown), attacked.units(round_to_8bit(result.adv, clean, threat))
    assert (attacked.seen.layout.only(made) - real).abs().max() * 255 < 2.1


def test_a_blank_picture_starts_grey_and_may_become_anything():
    blank = victim("CLIP", surface="blank")
    threat = ThreatModel.parse("linf", None, Surface("blank"))
    assert (blank.split(blank.pixels())[0] * 255 == 128).all()
    result = ATTACKS["pgd"](blank, blank.pixels(), threat, steps=3, early_stop=False)
    (one,), *_ = blank.pictures(result.adv)
    assert one.min() == 0 and one.max() == 255 and one.shape == (*SIZES[0], 3)


def test_clean_answers_are_those_to_the_samples_own_pictures():
    family = by_name["LLaVA"]
    subject, samples = Pipeline("LLaVA", family.model(), processor_of(family)), parts("LLaVA")[3]
    said = {name: Runner(subject, samples, surface=Surface(name)).clean().predictions for name in SURFACES}
    assert said["input"] == said["upload"] == said["patch"] == said["blank"]
    grey = [replace(s, images=(np.full_like(s.images[0], 128),)) for s in samples]
    assert subject.generate(grey) != said["blank"], "the model sees the difference"


def test_square_draws_into_pictures_of_different_sizes():
    attacked = victim("LLaVA")
    attacked.exact = False
    clean = attacked.pixels()
    result = ATTACKS["square"](attacked, clean, EPS, steps=6, seed=1)
    assert 0 < (result.adv - clean).abs().max() <= EPS.eps + 1e-6
    assert not result.adv[~attacked._mask.unsqueeze(2).expand_as(clean)].any(), "no padding"


def test_jpeg_is_in_the_loop():
    through = victim("Qwen2-VL", surface="upload:jpeg=40")
    clean = through.pixels().requires_grad_()
    made = through.seen.layout.only(through.units(clean))
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
