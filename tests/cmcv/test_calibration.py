import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmai_fast.cmcv import Threshold, calibrate


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60),
    st.floats(0, 0.99),
)
def test_at_most_the_stated_share_is_rejected_and_no_higher_tau_would_do(scores, rate):
    scores = np.array(scores)
    tau = calibrate(scores, rate)
    assert (scores < tau).mean() <= rate + 1e-9
    assert (scores < math.nextafter(tau, 2)).mean() > rate - 1e-9


def test_tau_is_exact_for_float32_scores():
    scores = torch.linspace(-1, 1, 101)
    tau = calibrate(scores, 0.05)
    assert int((scores < tau).sum()) == 5
    assert sum(s < tau for s in scores.tolist()) == 5


@pytest.mark.parametrize("scores, rate", [([], 0.05), ([float("nan"), 0.2], 0.05), ([0.1], 1.0), ([0.1], -0.01)])
def test_bad_calibration_is_refused(scores, rate):
    with pytest.raises(ValueError, match="expected"):
        calibrate(scores, rate)


@pytest.mark.parametrize("change", [{"tau": math.nan}, {"false_rejection_rate": 1.5}, {"samples": 0}])
def test_bad_threshold_is_refused(change):
    good = {"tau": 0.1, "false_rejection_rate": 0.05, "samples": 100, "split": "calibration"}
    Threshold(**good)
    with pytest.raises(ValueError, match=next(iter(change))):
        Threshold(**(good | change))
