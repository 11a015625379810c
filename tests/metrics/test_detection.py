from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cmai_fast.metrics import auroc, roc_curve, threshold_at_fpr, tpr_at_fpr

# Few distinct values: most pairs of scores tie somewhere.
scores = st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=30)


def sklearn_input(clean, adversarial):
    return np.r_[np.zeros(len(clean)), np.ones(len(adversarial))], -np.r_[clean, adversarial]


def on_segment(point, start, end):
    (x, y), (x0, y0), (x1, y1) = point, start, end
    return x0 <= x <= x1 and y0 <= y <= y1 and abs((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) < 1e-12


@given(scores, scores)
@settings(deadline=None)
def test_auroc_and_roc_agree_with_sklearn_with_ties(clean, adversarial):
    truth, score = sklearn_input(clean, adversarial)
    assert auroc(clean, adversarial) == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-12)
    fpr, tpr = roc_curve(clean, adversarial)
    ours = list(zip(fpr, tpr, strict=True))
    theirs = list(zip(*sk.roc_curve(truth, score, drop_intermediate=False)[:2], strict=True))
    assert set(ours) <= set(theirs) and ours[0] == (0, 0) and ours[-1] == (1, 1)
    assert all(any(on_segment(p, a, b) for a, b in pairwise(ours)) for p in theirs)
    assert np.trapezoid(tpr, fpr) == pytest.approx(auroc(clean, adversarial), abs=1e-12)


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.05, 0.29, 0.5, 0.99]))
@settings(deadline=None)
def test_tpr_at_fpr_is_the_best_point_of_the_whole_curve(clean, adversarial, allowed):
    truth, score = sklearn_input(clean, adversarial)
    fpr, tpr, _ = sk.roc_curve(truth, score, drop_intermediate=False)
    assert tpr_at_fpr(clean, adversarial, allowed) == pytest.approx(tpr[fpr <= allowed + 1e-9].max(), abs=1e-12)


def test_continuous_scores_agree_with_sklearn():
    rng = np.random.default_rng(0)
    clean, adversarial = rng.normal(1, 1, 700), rng.normal(0, 2, 500)
    truth, score = sklearn_input(clean, adversarial)
    assert auroc(clean, adversarial) == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-12)
    assert auroc(torch.tensor(clean), torch.tensor(adversarial)) == auroc(clean, adversarial)


def test_auroc_at_its_corners():
    assert auroc([0.9, 0.8], [0.1, 0.2]) == 1
    assert auroc([0.1, 0.2], [0.9, 0.8]) == 0
    assert auroc([0.5, 0.5], [0.5]) == 0.5


def test_threshold_takes_all_of_the_allowed_share():
    clean = np.arange(100.0)
    for share, rejected in ((0.0, 0), (0.05, 5), (0.29, 29), (0.999, 99)):
        assert (clean < threshold_at_fpr(clean, share)).sum() == rejected


@pytest.mark.parametrize("clean", [[], [float("nan"), 0.1], [float("inf")], [[0.1]]])
def test_bad_scores_are_refused(clean):
    for call in (lambda: auroc(clean, [0.1]), lambda: roc_curve([0.1], clean), lambda: tpr_at_fpr(clean, [0.1], 0.05)):
        with pytest.raises(ValueError, match="expected"):
            call()


@pytest.mark.parametrize("share", [-0.1, 1.0, 5])
def test_bad_share_is_refused(share):
    with pytest.raises(ValueError, match="expected 0 <= share < 1"):
        threshold_at_fpr([0.1, 0.2], share)
