"""The pictures of a report: the right ones, the right answers, and PNGs that say what the tensors said."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.evaluation.pictures import shown
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 64 / 255)


@pytest.fixture(scope="module")
def measured(subject, samples):
    return measure(subject, samples, THREAT, [AttackSpec("pgd", 8)])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).astype(int)


def row_of(picture, measured):
    """The place among the samples, by the clean picture."""
    own = measured.runner.images(range(12))
    return next(i for i, x in enumerate(own) if (levels(x[0]) == pixels(picture.record["clean_png"])).all())


def levels(image):
    return (image * 255).round().int().permute(1, 2, 0).numpy()


def test_pictures_are_what_the_model_saw(subject, samples, measured):
    pictures = shown("undefended", measured, "pgd-8", THREAT, most=4)
    assert len(pictures) == 4
    for picture in pictures:
        record = picture.record
        clean, adv = pixels(record["clean_png"]), pixels(record["adversarial_png"])
        assert clean.shape == (64, 64, 3) and 0 < np.abs(adv - clean).max() <= 64
        amplified = pixels(record["perturbation_png"]) - 127.5
        np.testing.assert_allclose(amplified, (adv - clean) * record["amplification"], atol=2)
        assert np.abs(amplified).max() > 120  # amplified to the whole range
        row = row_of(picture, measured)
        assert record["question"] == samples[row].prompt and record["answer"] == samples[row].answer
        assert record["against"] == "undefended" and record["answers"] == {}
        # The answers are those to the 8-bit picture that is shown.
        for name in ("one", "two"):
            picture.ask(name, subject)
        png = torch.from_numpy(adv).permute(2, 0, 1)[None, None].float() / 255
        expected = {"clean": samples[row].answer, "adversarial": subject.generate(samples[row : row + 1], png)[0]}
        assert record["answers"] == {"one": expected, "two": expected}
    assert any(p.record["answers"]["one"]["adversarial"] != p.record["answer"] for p in pictures)


def test_broken_samples_come_first_and_what_was_not_attacked_never(measured):
    right = np.array([i not in (5, 9) for i in range(1, 12)])
    found = measured.attacked["pgd-8"]
    attacked = replace(found, rows=list(range(1, 12)), right=right, scores=found.scores[1:])
    flawed = replace(measured, attacked={"pgd-8": attacked})
    rows = [row_of(p, measured) for p in shown("m", flawed, "pgd-8", THREAT, most=5)]
    assert rows[:2] == [5, 9] and len(set(rows)) == 5 and 0 not in rows
    nothing = replace(attacked, rows=[], right=np.zeros(0, dtype=bool), scores=np.zeros(0))
    assert shown("m", replace(measured, attacked={"pgd-8": nothing}), "pgd-8", THREAT) == []


def test_wrong_answers_that_the_guard_accepts_are_shown_and_marked(measured):
    attacked, count = measured.attacked["pgd-8"], len(measured.attacked["pgd-8"].rows)
    tau = measured.runner.pipeline.threshold.tau
    right, scores = np.zeros(count, dtype=bool), np.full(count, tau - 0.1)
    scores[[count - 1, count - 2]] = tau, tau + 0.1
    flawed = replace(attacked, right=right, scores=scores)
    pictures = shown("m", replace(measured, attacked={"pgd-8": flawed}), "pgd-8", THREAT, most=4)
    rows = [row_of(p, measured) for p in pictures]
    assert set(rows[:2]) == {attacked.rows[-1], attacked.rows[-2]} and len(set(rows)) == 4
    assert [p.record["accepted"] for p in pictures] == [True, True, False, False]
    plain = shown("m", replace(measured, attacked={"pgd-8": replace(flawed, scores=None)}), "pgd-8", THREAT, most=4)
    assert all("accepted" not in p.record for p in plain)


def test_an_image_that_was_not_moved(measured):
    own = dict(enumerate(measured.runner.images(range(12))))
    still = replace(measured, attacked={"pgd-8": replace(measured.attacked["pgd-8"], images=own)})
    (picture,) = shown("m", still, "pgd-8", THREAT, most=1)
    assert np.abs(pixels(picture.record["perturbation_png"]) - 127.5).max() < 1
