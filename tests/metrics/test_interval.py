import numpy as np
import pytest

from cmai_fast.metrics import bootstrap_interval, interval


def test_interval_has_the_width_that_the_binomial_law_gives():
    right = np.arange(500) < 400
    low, high = bootstrap_interval(right)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 500)
    assert low == pytest.approx(0.8 - half, abs=0.006) and high == pytest.approx(0.8 + half, abs=0.006)
    narrow = bootstrap_interval(right, confidence=0.5)
    assert low < narrow[0] < 0.8 < narrow[1] < high


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.random(200) < 0.7, resamples=400, seed=trial)
        covered += low <= 0.7 <= high
    assert 178 <= covered <= 199  # 190 expected, standard deviation 3


def test_same_seed_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_drawing_in_chunks_gives_all_resamples(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(values, resamples=1001)
    monkeypatch.setattr(interval, "_CHUNK", 50 * 7)
    assert bootstrap_interval(values, resamples=1001) == whole


def test_no_variation_gives_no_width():
    assert bootstrap_interval([True] * 20) == (1.0, 1.0)


@pytest.mark.parametrize(
    "arguments",
    [{"values": []}, {"values": [np.nan]}, {"values": [0.5], "confidence": 1.0}, {"values": [0.5], "resamples": 0}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        bootstrap_interval(**arguments)
