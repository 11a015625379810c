from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmai_fast.metrics import recall_at

BOTH = ("image-to-text", "text-to-image")


def by_definition(similarity, owner, k, direction):
    """A query counts if a right answer is among the k best, all sorted."""
    if direction == "text-to-image":
        return np.mean([owner[t] in np.argsort(-similarity[:, t], kind="stable")[:k] for t in range(len(owner))])
    best = [np.argsort(-row, kind="stable")[:k] for row in similarity]
    return np.mean([any(owner[t] == i for t in texts) for i, texts in enumerate(best)])


@given(
    st.integers(1, 5), st.integers(0, 6), st.integers(1, 8), st.integers(0, 10**6), st.booleans(), st.sampled_from(BOTH)
)
@settings(deadline=None)
def test_it_is_the_definition(images, more, k, seed, ties, direction):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.r_[np.arange(images), rng.integers(0, images, more)])
    similarity = rng.integers(0, 3, (images, len(owner))) if ties else rng.normal(size=(images, len(owner)))
    expected = by_definition(similarity, owner, k, direction)
    assert recall_at(similarity, owner, k, direction) == pytest.approx(expected)
    assert recall_at(torch.tensor(similarity), torch.tensor(owner), k, direction) == pytest.approx(expected)


def test_several_captions_per_image_by_hand():
    similarity = np.array([[0.1, 0.9, 0.3, 0.2], [0.8, 0.2, 0.1, 0.7]])
    owner = [0, 0, 1, 1]
    assert recall_at(similarity, owner, 1, "image-to-text") == 0.5  # image 1 finds text 0 first, then its text 3
    assert recall_at(similarity, owner, 2, "image-to-text") == 1.0
    assert recall_at(similarity, owner, 1, "text-to-image") == 0.5
    assert recall_at(similarity, owner, 2, "text-to-image") == 1.0


def test_a_text_may_belong_to_several_images_or_to_none():
    similarity, right = (
        np.array([[0.1, 0.9, 0.0], [0.0, 0.2, 0.5]]),
        np.array([[True, False, False], [False, False, True]]),
    )
    found = [recall_at(similarity, right, k, way) for way in BOTH for k in (1, 2)]
    assert found == [0.5, 1.0, 1.0, 1.0], "the second text is nobody's: no query, but in the way"
    assert recall_at(similarity, right | right[::-1], 1, "text-to-image") == 1.0


@pytest.mark.parametrize("direction", BOTH)
def test_the_same_score_for_everything_finds_what_chance_finds(direction):
    assert recall_at(np.ones((10, 10)), np.arange(10), 1, direction) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "similarity, owner, k, direction",
    [
        (np.ones((2, 3)), [0, 1], 1, BOTH[0]),
        (np.ones(3), [0, 1, 1], 1, BOTH[0]),
        (np.ones((0, 0)), [], 1, BOTH[0]),
        (np.full((2, 2), np.nan), [0, 1], 1, BOTH[0]),
        (np.ones((2, 2)), [0, 0], 1, BOTH[0]),
        (np.ones((2, 2)), [0, 2], 1, BOTH[1]),
        (np.ones((2, 2)), [0.0, 1.0], 1, BOTH[1]),
        (np.ones((2, 2)), np.zeros((2, 2), dtype=bool), 1, BOTH[1]),
        (np.ones((2, 2)), [True, True], 1, BOTH[1]),
        (np.ones((2, 2)), [0, 1], 0, BOTH[1]),
        (np.ones((2, 2)), [0, 1], 1, "i2t"),
    ],
)
def test_bad_arguments_are_refused(similarity, owner, k, direction):
    with pytest.raises(ValueError, match="expected"):
        recall_at(similarity, owner, k, direction)
