from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.data import remembered
from cmai_fast.data.remembered import RememberedPictures
from families import FAMILIES, picture


class Counting:
    """An image processor that says how often it was asked."""

    def __init__(self, family):
        self.own, self.calls = family.processor, 0

    def __call__(self, images, **kwargs):
        self.calls += 1
        return self.own(images=images, **kwargs)


GENERATIVE = pytest.mark.parametrize("family", [f for f in FAMILIES if f.kind == "generative"], ids=lambda f: f.name)


@GENERATIVE
def test_pictures_one_by_one_are_what_the_image_processor_makes_of_all(family):
    several = [[picture(i, *s.pictures[0].shape[:2])] for i, s in enumerate(family.samples())]
    own = family.processor(images=several if family.nested else [p for (p,) in several], return_tensors="pt")
    made = RememberedPictures(family.processor)(several)
    assert set(made) == set(own)
    for key, value in own.items():
        torch.testing.assert_close(torch.as_tensor(made[key]), torch.as_tensor(value), rtol=0, atol=0)


def test_small_arrays_are_remembered_and_others_are_not(monkeypatch):
    counting = Counting(FAMILIES[0])
    remember, image = RememberedPictures(counting), picture(0)
    for _ in range(2):
        remember([image, image.copy()])
    assert counting.calls == 1
    remember([np.kron(image, np.ones((3, 3, 1), np.uint8))])
    remember([Image.fromarray(image)] * 2)
    assert counting.calls == 4
    monkeypatch.setattr(remembered, "_ROOM", 2 * 32 * 32 * 3 * 4)  # two encoded pictures
    counting = Counting(FAMILIES[0])
    remember = RememberedPictures(counting)
    for _ in range(2):
        remember([picture(i) for i in range(3)])
    assert counting.calls == 4


def test_it_has_what_the_image_processor_has_and_can_be_sent_to_a_worker():
    remember = RememberedPictures(FAMILIES[0].processor)
    assert remember.image_mean == FAMILIES[0].processor.image_mean
    with pytest.raises(AttributeError, match="merge_size"):
        remember.merge_size  # noqa: B018
    again = pickle.loads(pickle.dumps(remember))
    assert torch.equal(again([picture(1)])["pixel_values"], remember([picture(1)])["pixel_values"])
