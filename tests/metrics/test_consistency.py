from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmai_fast.metrics import accuracy, consistency
from cmai_fast.metrics.consistency import nlvr2_sentence


def test_a_sentence_counts_when_all_its_examples_are_right():
    identifiers = ["dev-850-0-0", "dev-850-1-0", "dev-850-0-1", "dev-850-1-1", "dev-9-3-0"]
    groups = [nlvr2_sentence(i) for i in identifiers]
    assert groups[0] == groups[1] == "dev-850--0" and len(set(groups)) == 3
    assert consistency([True, True, True, False, True], groups) == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1))
def test_it_is_the_share_of_groups_without_a_mistake(samples):
    right, groups = zip(*samples, strict=True)
    wrong = {g for r, g in samples if not r}
    assert consistency(right, groups) == pytest.approx(1 - len(wrong) / len(set(groups)))
    assert consistency(right, range(len(right))) == pytest.approx(accuracy(right))


@pytest.mark.parametrize("right, groups", [([], []), ([True], ["a", "b"]), ([1.0], ["a"])])
def test_bad_verdicts_are_refused(right, groups):
    with pytest.raises(ValueError, match="expected"):
        consistency(right, groups)


def test_another_identifier_is_refused():
    with pytest.raises(ValueError, match="NLVR2 identifier '1572-0'; expected split-set-pair-sentence"):
        nlvr2_sentence("1572-0")
