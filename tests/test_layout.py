"""Pixels by sample: what an attack changes is what the model sees, and what a PNG file keeps."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from cmai_fast.attacks import Victim
from cmai_fast.attacks.pgd import pgd
from cmai_fast.bridge import bridge_of
from cmai_fast.layout import Layout, Patches
from cmai_fast.mbat import maximise
from cmai_fast.pixels import PixelSpace, round_to_8bit
from cmai_fast.threat import ThreatModel
from families import FAMILIES, MEAN, SIZE, STD, Family, picture

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
patched = pytest.mark.parametrize("family", [f for f in FAMILIES if "Qwen" in f.name], ids=lambda f: f.name)
LINF = ThreatModel("linf", 8 / 255)


def objective_of(family: Family) -> Victim:
    batch = family.batch(family.model(), family.samples())
    return Victim(bridge_of(family.model()), PixelSpace.from_processor(family.processor), batch)


def saved_and_loaded(pictures: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    def through_png(array: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return np.asarray(Image.open(file))

    return [[through_png(p) for p in own] for own in pictures]


@every_family
def test_untouched_pixels_give_the_processors_own_pixel_values(family):
    """Normalised once and not twice, each value in its place, each sample's in its own row."""
    objective = objective_of(family)
    batch = family.batch(family.model(), family.samples())
    clean = objective.pixels()
    again = objective.inputs(clean)
    assert set(again) == set(batch)
    for key, value in batch.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-6)
    assert torch.equal((clean * 255).round() / 255, clean)  # on the 8-bit grid, where every picture started


@pytest.mark.parametrize("threat", [LINF, ThreatModel("l2", 2.0)], ids=["linf", "l2"])
@every_family
def test_attacked_images_saved_as_png_and_loaded_are_the_same_model_input(family, threat):
    objective = objective_of(family)
    clean = objective.pixels()
    adv = maximise(objective, clean, threat, "pgd", steps=2).adv
    rounded = round_to_8bit(adv, clean, threat)
    pictures = objective.pictures(rounded)
    again = objective.from_pictures(saved_and_loaded(pictures))
    assert torch.equal(again, objective.layout.only(rounded) if objective.layout else rounded)
    with torch.no_grad():
        loss = [objective(objective.space.to_model(x)).loss for x in (rounded, again)]
    assert torch.equal(*loss)
    assert threat.distance(again - clean).max() <= threat.eps * (1 + 1e-5)
    changed = [[bool((p != q).any()) for p, q in zip(a, b, strict=True)]
               for a, b in zip(pictures, objective.pictures(clean), strict=True)]  # fmt: skip
    assert all(map(all, changed))


@every_family
def test_images_of_a_sample_fit_it_in_any_grouping(family):
    objective = objective_of(family)
    clean = objective.pixels()
    images = objective.split(clean)
    assert torch.equal(objective.join(images), clean)
    if objective.layout is not None:
        assert [len(i) for i in images] == objective.layout.real.sum(1).tolist()
    samples = family.samples()
    for rows in ([2], [1, 0]):
        batch = family.batch(family.model(), [samples[i] for i in rows])
        if family.kind == "dual":
            batch = {**family.batch(family.model(), samples), **{k: batch[k] for k in ("pixel_values", "labels")}}
        other = Victim(objective.bridge, objective.space, batch)
        assert torch.equal(other.join([images[i] for i in rows]), other.pixels())
    with pytest.raises(ValueError, match="made on one model fit another only if"):
        objective.join([i[..., :-1, :-1] for i in images] if objective.layout is None else [i[:-1] for i in images])


@patched
def test_pictures_of_patches_are_the_processors_input_and_output(family):
    """A picture whose sides are multiples of a merged patch is not resized: it comes back as it was."""
    objective = objective_of(family)
    samples, clean = family.samples(), objective.pixels()
    wanted = [list(s.pictures) for s in samples]
    for own, given in zip(objective.pictures(clean), wanted, strict=True):
        assert all(np.array_equal(p, q) for p, q in zip(own, given, strict=True))
    adv = round_to_8bit(maximise(objective, clean, LINF, "pgd", steps=2).adv, clean, LINF)
    files = [p for own in saved_and_loaded(objective.pictures(adv)) for p in own]
    reread = family.processor(images=files, return_tensors="pt")
    torch.testing.assert_close(reread["pixel_values"], objective.inputs(adv)["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["LLaVA", "PaliGemma", "InternVL", "BLIP-2", "ViT-GPT2", "CLIP", "SigLIP"])
def test_pictures_of_the_models_size_go_through_its_processor_again(name):
    family = next(f for f in FAMILIES if f.name == name)
    objective = objective_of(family)
    clean = objective.pixels()
    adv = round_to_8bit(maximise(objective, clean, LINF, "pgd", steps=2).adv, clean, LINF)
    files = [p for own in saved_and_loaded(objective.pictures(adv)) for p in own]
    reread = family.processor(images=files, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(reread, objective.inputs(adv)["pixel_values"], rtol=0, atol=1e-6)


@patched
def test_temporal_copies_stay_equal_and_both_give_their_gradient(family):
    objective = objective_of(family)
    adv = pgd(objective, objective.pixels(), LINF, steps=2, early_stop=False).adv
    values = objective.inputs(adv)["pixel_values"]
    copies = values.reshape(len(values), 3, 2, 8, 8)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1])
    units = torch.rand(*objective.layout.real.shape, 3, 8, 8, requires_grad=True)
    weights = torch.rand_like(objective.layout.pack(units))
    (grad,) = torch.autograd.grad((objective.layout.pack(units) * weights).sum(), units)
    both = weights.reshape(-1, 3, 2, 8, 8).sum(2)
    torch.testing.assert_close(grad[objective.layout.real], both)
    assert (grad[~objective.layout.real] == 0).all()


def test_frames_of_a_video_are_refused():
    family = next(f for f in FAMILIES if f.name == "Qwen2-VL")
    batch = family.batch(family.model(), family.samples())
    space = PixelSpace.from_processor(family.processor)
    moved = batch["pixel_values"].clone()
    moved[5, 70] += 0.1
    with pytest.raises(ValueError, match="frames of a video"):
        Victim(bridge_of(family.model()), space, {**batch, "pixel_values": moved}).pixels()
    grid = batch["image_grid_thw"] * torch.tensor([2, 1, 1])
    with pytest.raises(ValueError, match="expected images, whose first number is 1"):
        Layout(batch["pixel_values"], image_grid_thw=grid, patches=space.patches)


def test_bad_pixel_values_are_named():
    patches = Patches(8, 2, 2)
    with pytest.raises(ValueError, match="flattened patches, which need image_grid_thw"):
        Layout(torch.zeros(8, 384))
    with pytest.raises(ValueError, match="makes 4 patches, pixel_values have 8"):
        Layout(torch.zeros(8, 384), image_grid_thw=torch.tensor([[1, 2, 2]]), patches=patches)
    with pytest.raises(ValueError, match=r"patches have 380 values; expected channels \* Patches"):
        Layout(torch.zeros(4, 380), image_grid_thw=torch.tensor([[1, 2, 2]]), patches=patches)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\); expected images, tiles or flattened patches"):
        Layout(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="the samples have 3 images in all, pixel_values 2"):
        Layout(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]))
    plain = objective_of(next(f for f in FAMILIES if f.name == "BLIP-2"))
    bare = Victim(plain.bridge, plain.space, plain.batch)
    with pytest.raises(ValueError, match="the batch has no pixel_values"):
        bare.pixels()


def test_processors_that_flatten_images_say_how():
    processor = tf.Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2)
    assert PixelSpace.from_processor(processor).patches == Patches(14, 2, 2)
    assert PixelSpace.from_processor(tf.CLIPImageProcessorPil()).patches is None


def test_padding_inside_an_image_is_no_pixel_of_it():
    """Idefics pads images of different sizes to one: the model sees 0 there, and an attack leaves it so."""
    family = next(f for f in FAMILIES if f.name == "Idefics3")
    nested = [[picture(0)], [picture(1), picture(2)]]
    processor = tf.Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": SIZE}, max_image_size={"longest_edge": SIZE}, image_mean=MEAN,
        image_std=STD,
    )  # fmt: skip
    batch = dict(processor(images=nested, return_tensors="pt"))
    for place in ((0, 0, slice(20, None)), (1, 0, slice(None), slice(18, None))):
        batch["pixel_attention_mask"][place] = 0
    batch["pixel_values"] *= batch["pixel_attention_mask"][:, :, None]
    ids = torch.full((2, 14), 6)
    ids[0, :4], ids[1, :8] = 5, 5
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 11
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    objective = Victim(bridge_of(family.model()), PixelSpace(MEAN, STD), batch)
    mask = batch["pixel_attention_mask"].bool()
    assert objective.layout.mask is not None
    clean = objective.pixels()
    torch.testing.assert_close(objective.inputs(clean)["pixel_values"], batch["pixel_values"], rtol=0, atol=1e-6)
    for threat in (LINF, ThreatModel("l2", 2.0)):
        result = maximise(objective, clean, threat, "pgd", steps=1)
        values = objective.inputs(result.adv)["pixel_values"]
        outside = ~mask[:, :, None].expand_as(values)
        assert (values[outside] == 0).all() and (result.adv[outside] == clean[outside]).all()
        assert (values != batch["pixel_values"])[~outside].float().mean() > 0.8
        assert threat.distance(result.adv - clean).max() <= threat.eps * (1 + 1e-5)


def test_the_l2_start_of_a_sample_fills_its_own_ball():
    """Noise over padding would count in the norm of the sample, and take room from its pixels."""
    family = next(f for f in FAMILIES if f.name == "Qwen2-VL")
    objective = objective_of(family)
    clean = objective.pixels()
    still = maximise(objective, clean, ThreatModel("l2", 1.0), "pgd", steps=1, step_size=0.0, seed=3).adv
    distance = (still - clean).flatten(1).norm(dim=1)
    assert (distance > 0.95).all()  # in many dimensions nearly all of a ball lies at its surface
    assert (objective.layout.only(still - clean) == still - clean).all()


def test_a_black_tile_is_attacked_where_the_processors_mean_is_0():
    """Zeros of the model's input are its pixels then, and only a mask can tell them from padding."""
    family = next(f for f in FAMILIES if f.name == "SmolVLM")
    batch = family.batch(family.model(), family.samples())
    batch["pixel_values"] = (batch["pixel_values"] - batch["pixel_values"].min()) / 20
    batch["pixel_values"][0] = 0.0
    black = Victim(bridge_of(family.model()), PixelSpace([0.0] * 3, [1.0] * 3), batch)
    assert black.layout.real[0].any()
    result = maximise(black, black.pixels(), LINF, "pgd", steps=1)
    assert (result.adv[0][black.layout.real[0]] != 0).any()
    del batch["pixel_attention_mask"]
    with pytest.raises(ValueError, match="mean is 0, so a black tile looks like zero padding"):
        Victim(bridge_of(family.model()), PixelSpace([0.0] * 3, [1.0] * 3), batch).pixels()
