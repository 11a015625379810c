"""Attacks without a bound, on uploaded pictures: labels with a text, and pictures that show another one once shrunk."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.attacks.crossfire import rendered
from cmai_fast.attacks.typographic import PLACES, labelled
from cmai_fast.attacks.upload import UploadVictim
from cmai_fast.data import load_dataset
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.preprocessing.resampling import matrix
from cmai_fast.threat import Surface, ThreatModel
from cmai_fast.workflows.attack import attack

BOX = ThreatModel("linf", 1.0, Surface("upload"))
NEAREST, BICUBIC = 0, 3  # as Pillow numbers them
typographic, scaling = ATTACKS["typographic"], ATTACKS["scaling"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load("easyvqa-llava", device="cpu")


def victim(pipeline, samples) -> UploadVictim:
    return UploadVictim(pipeline.bridge, pipeline.space, pipeline.collate, samples, surface=BOX.surface)


def test_a_label_is_a_box_at_its_place_and_all_else_stays():
    picture = np.full((40, 60, 3), 90, np.uint8)
    for place, rows, columns in (
        ((0.25, 0.5, 1.0, 0.0), slice(30, 40), slice(0, 30)),
        ((0.5, 1.0, 0.0, 0.5), slice(0, 20), slice(0, 60)),
        ((0.25, 0.5, 0.5, 0.5), slice(15, 25), slice(15, 45)),
    ):
        found = labelled(picture, place, "red")
        box = found[rows, columns]
        assert np.array_equal(box, rendered("red", *box.shape[:2])) and (box == 255).any() and (box < 64).any()
        found[rows, columns] = 90
        assert np.array_equal(found, picture)


def test_every_label_is_asked_about_and_the_worst_is_kept(pipeline):
    """Against a plain loop over all texts and places, one sample at a time."""
    samples = list(load_dataset("easyvqa", "test", 3, 0))
    samples = [replace(s, choices=(*s.references, "teal", "no" if s.answer == "yes" else "yes")) for s in samples]
    made = victim(pipeline, samples)
    made.exact = False  # it takes all its queries
    result = typographic(made, made.pixels(), BOX, sample_ids=torch.arange(3))
    assert made.forwards.tolist() == [1 + 2 * len(PLACES)] * 3 and not made.backwards.any()
    for row, sample in enumerate(samples):
        alone, losses = victim(pipeline, [sample]), {}
        for place in PLACES:
            for text in sample.wrong_choices:
                drawn = labelled(np.array(sample.images[0]), place, text)
                with torch.no_grad():
                    losses[place, text] = float(alone(alone.from_pictures([[drawn]])).loss)
        place, text = max(losses, key=losses.__getitem__)
        assert result.details["text"][row] == text
        assert np.array_equal(made.pictures(result.adv)[row][0], labelled(np.array(sample.images[0]), place, text))
        assert result.loss[row] == pytest.approx(losses[place, text], abs=1e-5)
        assert 0.1 < result.details["changed"][row] <= 0.5 and result.details["delta_max"][row] > 100
    before, made.targeted = made.forwards, True  # labels are then what is to be said, and this alone is written
    aimed = typographic(made, made.pixels(), BOX)
    assert (made.forwards - before).tolist() == [1 + len(PLACES)] * 3
    assert all(text in ("", s.answer) for text, s in zip(aimed.details["text"], samples, strict=True))
    before = made.forwards
    typographic(made, made.pixels(), BOX, steps=3)
    assert (made.forwards - before).tolist() == [1 + 3] * 3


def test_labels_break_the_undefended_model_and_the_record_says_how(tmp_path):
    record = attack(
        "easyvqa-llava", DataSource("easyvqa"), "typographic", BOX, limit=12, out=tmp_path / "a.json", progress=False,
    )  # fmt: skip
    assert record["broken"] >= 3 and record["settings"]["eps"] == 1 and record["settings"]["threat"] == "upload"
    rows = [row for row in record["per_sample"] if row["attacked"]]
    assert record["details"]["changed"] == pytest.approx(np.mean([row["changed"] for row in rows]))
    assert all(row["text"] for row in rows if not row["right_adv"]) and "text" not in record["details"]
    json.dumps(record)


def big(pipeline, count: int, size: int, low: int, high: int) -> list:
    """Easy-VQA samples with smooth pictures of `size` whose levels are in a range that the attack does not leave."""
    found = []
    for sample in load_dataset("easyvqa", "test", count, 0):
        picture = Image.fromarray(np.asarray(sample.images[0])).resize((size, size), Image.Resampling.BICUBIC)
        scaled = low + (np.asarray(picture).astype(float) / 255 * (high - low)).round()
        found.append(replace(sample, images=(scaled.astype(np.uint8),)))
    return found


@pytest.fixture
def resampled(pipeline):
    processor = pipeline.processor.image_processor
    before = processor.resample

    def use(resample: int) -> None:
        processor.resample = resample

    yield use
    processor.resample = before


def seen(pipeline, sample, picture) -> np.ndarray:
    """What the processor itself makes of a picture, in levels."""
    batch = pipeline.collate([replace(sample, images=(Image.fromarray(picture),))])
    return Victim(pipeline.bridge, pipeline.space, batch).pixels()[0].permute(1, 2, 0).numpy() * 255


def test_without_antialiasing_only_the_pixels_that_are_looked_at_change(pipeline, resampled, tmp_path):
    resampled(NEAREST)
    samples = big(pipeline, 2, 256, 0, 255)
    target = np.asarray(samples[1].images[0])
    Image.fromarray(target).save(tmp_path / "b.png")
    made = victim(pipeline, samples)
    result = scaling(made, made.pixels(), BOX, picture=str(tmp_path / "b.png"))
    adv = made.pictures(result.adv)[0][0]
    assert np.abs(seen(pipeline, samples[0], adv) - seen(pipeline, samples[0], target)).max() < 1.01
    looked = np.zeros((256, 256), bool)
    looked[2::4, 2::4] = True  # the middle of each 4 x 4 block
    assert np.array_equal(adv[~looked], samples[0].images[0][~looked])
    assert result.details["changed"][0] <= 1 / 16 and result.details["view_max"][0] <= 1
    assert made.passes.full_forward == 1 and result.details["delta_mean"][1] == 0  # its own picture is there already


def test_with_antialiasing_it_finds_the_smallest_change_there_is_which_is_plain_to_see(pipeline, resampled, tmp_path):
    """Against the pseudoinverse of the resizing, where the box does not cut."""
    resampled(BICUBIC)
    samples = big(pipeline, 2, 160, 90, 165)
    target = Image.fromarray(samples.pop().images[0])
    target.save(tmp_path / "b.png")
    made = victim(pipeline, samples)
    result = scaling(made, made.pixels(), BOX, picture=str(tmp_path / "b.png"), steps=60)
    own, adv = samples[0].images[0].astype(float), made.pictures(result.adv)[0][0].astype(float)
    line = matrix(160, 64, "bicubic").double().numpy()
    both = lambda one, picture: np.einsum("ij,jkc,lk->ilc", one, picture, one, optimize=True)  # noqa: E731
    shrink = lambda picture: both(line, picture)  # noqa: E731
    least = both(np.linalg.pinv(line), shrink(np.asarray(target, float)) - shrink(own))
    assert np.abs(least).max() < 90  # the box does not cut
    assert np.abs(adv - own - least).mean() < 0.75 and np.linalg.norm(adv - own) < 1.05 * np.linalg.norm(least)
    apart = np.abs(seen(pipeline, samples[0], adv.astype(np.uint8)) - seen(pipeline, samples[0], np.asarray(target)))
    assert apart.max() <= 3 and result.details["view_mean"][0] == pytest.approx(apart.mean(), abs=0.2)
    assert result.details["delta_mean"][0] > 0.8 * np.abs(shrink(np.asarray(target, float)) - shrink(own)).mean()


def test_what_has_no_bound_refuses_one_and_everything_that_it_does_not_take(pipeline, tmp_path):
    samples = list(load_dataset("easyvqa", "test", 1, 0))
    made, picture = victim(pipeline, samples), str(tmp_path / "b.png")
    Image.new("RGB", (8, 8)).save(picture)
    for threat in (
        ThreatModel("linf", 1.0),
        ThreatModel("linf", 8 / 255, BOX.surface),
        ThreatModel("linf", 1.0, Surface("patch")),
    ):
        for name in ("typographic", "scaling"):
            with pytest.raises(
                ValueError, match=rf"{name} changes the uploaded picture without a bound, and the threat"
            ):
                AttackSpec(name, settings={"picture": picture} if name == "scaling" else {}).check(threat)
    plain = Victim(pipeline.bridge, pipeline.space, pipeline.collate(samples))
    for call, message in (
        (lambda: typographic(plain, plain.pixels(), BOX), "typographic changes the picture that is uploaded"),
        (lambda: scaling(plain, plain.pixels(), BOX, picture=picture), "scaling changes the picture that is uploaded"),
        (lambda: typographic(made, made.pixels(), BOX, restarts=2), "restarts is 2, and nothing is random"),
        (lambda: scaling(made, made.pixels(), BOX, restarts=2, picture=picture), "restarts is 2, and nothing is"),
        (lambda: AttackSpec("scaling", settings={"picture": "no.png"}), "picture is 'no.png'; expected a picture file"),
        (lambda: AttackSpec("typographic", settings={"text": " "}), "text is ' '; expected a text to write"),
        (lambda: AttackSpec("scaling", settings={"picture": picture}, target="yes"), "scaling does not take target"),
        (lambda: scaling(made, made.pixels(), BOX), "there is no picture to show"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    bare = victim(pipeline, [replace(samples[0], choices=())])
    with pytest.raises(ValueError, match="has no other answers to write"):
        typographic(bare, bare.pixels(), BOX)
