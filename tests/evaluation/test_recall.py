from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmai_fast.evaluation.recall import KS, recalls


@given(seed=st.integers(0, 10_000), images=st.integers(1, 14), each=st.integers(1, 5))
def test_recall_is_that_of_the_definition(seed, images, each):
    """Karpathy's: an image is found if the best rank of its captions is below K, a caption by the rank of its image."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(images, images * each, generator=generator)
    owner = torch.arange(images).repeat_interleave(each)
    found = recalls(similarity, owner == torch.arange(images)[:, None])
    for k in KS:
        best = [
            min(int((row > row[t]).sum()) for t in range(len(owner)) if owner[t] == i)
            for i, row in enumerate(similarity)
        ]
        ranks = [int((similarity[:, t] > similarity[owner[t], t]).sum()) for t in range(len(owner))]
        assert found[f"image-to-text R@{k}"] == pytest.approx(sum(r < k for r in best) / images)
        assert found[f"text-to-image R@{k}"] == pytest.approx(sum(r < k for r in ranks) / len(owner))


def test_texts_of_no_image_are_distractors_only():
    similarity = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.2, 0.5]])
    relevant = torch.tensor([[True, False, False], [False, False, True]])
    found = recalls(similarity, relevant)
    assert found["image-to-text R@1"] == 0.5 and found["text-to-image R@1"] == 1.0 and found["image-to-text R@5"] == 1.0
