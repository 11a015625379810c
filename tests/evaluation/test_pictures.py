"""The picture grid: the right pictures, the right answers, and PNGs that say what the tensors said."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.evaluation.pictures import picture_grid
from cmai_fast.evaluation.protocol import AttackSpec, measure
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 64 / 255)


@pytest.fixture(scope="module")
def measured(subject, samples):
    return measure(subject, samples, THREAT, [AttackSpec("pgd", 8)])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


def row_of(picture, measured):
    """The place among the samples, by the clean picture."""
    return next(i for i, x in enumerate(measured.clean) if (levels(x[0]) == pixels(picture["clean_png"])).all())


def levels(image):
    return (image * 255).round().int().permute(1, 2, 0).numpy()


def test_pictures_are_what_the_model_saw(subject, samples, measured):
    pictures = picture_grid({"undefended": subject}, {"undefended": measured}, samples, "pgd-8", THREAT, most=4)
    assert len(pictures) == 4
    for picture in pictures:
        clean, adv = pixels(picture["clean_png"]), pixels(picture["adversarial_png"])
        assert clean.shape == (64, 64, 3) and 0 < np.abs(adv - clean).max() <= 64
        amplified = pixels(picture["perturbation_png"]) - 127.5
        np.testing.assert_allclose(amplified, (adv - clean) * picture["amplification"], atol=2)
        assert np.abs(amplified).max() > 120  # amplified to the whole range
        row = row_of(picture, measured)
        assert picture["question"] == samples[row].prompt and picture["answer"] == samples[row].answer
        # The answers are those to the 8-bit picture that is shown.
        shown = torch.from_numpy(adv).permute(2, 0, 1)[None, None].float() / 255
        assert picture["undefended"] == {
            "clean": samples[row].answer, "adversarial": subject.generate(samples[row : row + 1], shown)[0],
        }  # fmt: skip
    assert any(p["undefended"]["adversarial"] != p["answer"] for p in pictures)


def test_broken_samples_come_first_and_wrong_ones_never(subject, samples, measured):
    attacked = measured.attacked["pgd-8"]
    right, verdict = measured.clean_right.copy(), attacked.right.copy()
    try:
        measured.clean_right[:] = [i != 0 for i in range(12)]
        attacked.right[:] = [i not in (0, 5, 9) for i in range(12)]
        pictures = picture_grid({"undefended": subject}, {"undefended": measured}, samples, "pgd-8", THREAT, most=5)
        rows = [row_of(p, measured) for p in pictures]
        assert rows[:2] == [5, 9] and len(set(rows)) == 5 and 0 not in rows
        measured.clean_right[:] = False
        assert picture_grid({"undefended": subject}, {"undefended": measured}, samples, "pgd-8", THREAT) == []
    finally:
        measured.clean_right[:], attacked.right[:] = right, verdict


def test_both_models_answer_to_the_images_made_for_each(subject, samples, measured):
    subjects = {"undefended": subject, "immunised": subject}
    pictures = picture_grid(subjects, dict.fromkeys(subjects, measured), samples, "pgd-8", THREAT, most=2)
    assert [p["against"] for p in pictures] == ["undefended"] * 2 + ["immunised"] * 2
    assert all(p["undefended"] == p["immunised"] for p in pictures)


def test_an_image_that_was_not_moved(subject, samples, measured):
    attacked = measured.attacked["pgd-8"]
    adv, attacked.adv = attacked.adv, measured.clean
    try:
        (picture,) = picture_grid({"undefended": subject}, {"undefended": measured}, samples, "pgd-8", THREAT, most=1)
    finally:
        attacked.adv = adv
    assert np.abs(pixels(picture["perturbation_png"]) - 127.5).max() < 1
