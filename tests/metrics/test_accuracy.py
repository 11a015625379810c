import numpy as np
import pytest
import torch

from cmai_fast.metrics import accuracy, attack_success_rate, rejection_accuracy, worst_case


def test_accuracy_is_the_share_that_is_right():
    assert accuracy([True, False, True, True]) == 0.75
    assert accuracy(torch.tensor([True, False])) == 0.5


def test_a_sample_is_robust_only_if_every_input_is_right():
    clean, pgd, apgd = [True, True, True, False], [True, False, True, True], [True, True, False, True]
    np.testing.assert_array_equal(worst_case(clean, pgd, apgd), [True, False, False, False])


def test_success_rate_counts_only_samples_right_before():
    before, after = [True, True, True, True, False, False], [False, True, True, False, False, True]
    assert attack_success_rate(before, after) == 0.5


def test_success_rate_is_undefined_when_nothing_was_right():
    assert attack_success_rate([False, False], [False, True]) is None


def test_rejection_accuracy_by_hand():
    clean_right = [True, True, True, False, True]
    clean_accepted = [True, True, False, True, True]
    right = [True, False, True, True, False]
    accepted = [True, False, True, True, True]
    # right and kept; wrong but rejected; clean input rejected; clean wrong; wrong and accepted
    assert rejection_accuracy(clean_right, clean_accepted, (right, accepted)) == 2 / 5
    assert rejection_accuracy(clean_right, clean_accepted, (right, accepted), ([False] * 5, [True] * 5)) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: accuracy([]),
        lambda: accuracy([1, 0]),
        lambda: accuracy([[True]]),
        lambda: worst_case(),
        lambda: worst_case([True], [True, False]),
        lambda: attack_success_rate([True], [True, False]),
        lambda: rejection_accuracy([True], [True], ([True, True], [True, True])),
    ],
)
def test_bad_verdicts_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()
