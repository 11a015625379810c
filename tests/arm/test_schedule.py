import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmai_fast.arm import ARMSchedule

WARM = 10  # 1 / (1 - momentum) for the default momentum


def schedule(**change):
    return ARMSchedule(**({"tau_train": 0.3, "beta": 0.5, "beta_max": 2.0, "beta_step": 0.1} | change))


def batch(mean, spread=0.0, n=8):
    return mean + spread * torch.linspace(-1, 1, n)


def run(arm, mean, updates):
    for _ in range(updates):
        arm.update(batch(mean))
    return arm.beta


def test_beta_stays_while_batches_look_consistent():
    assert run(schedule(), 0.31, 200) == 0.5


def test_beta_rises_a_step_an_update_to_the_maximum_when_they_do_not():
    arm = schedule()
    assert run(arm, 0.2, WARM - 1) == 0.5
    assert run(arm, 0.2, 1) == pytest.approx(0.6)
    assert run(arm, 0.2, 2) == pytest.approx(0.8)
    assert run(arm, 0.2, 12) == 2.0
    assert run(arm, 0.2, 40) == 2.0


def test_high_variance_raises_beta_too():
    arm = schedule(variance_max=0.1)
    for _ in range(WARM + 2):
        arm.update(batch(0.6, spread=0.9))
    assert arm.mean == pytest.approx(0.6) and arm.variance > 0.1
    assert arm.beta > 0.6


def test_between_the_two_marks_nothing_starts_and_nothing_ends():
    arm = schedule(hysteresis=0.1)
    assert run(arm, 0.35, 50) == 0.5
    arm = schedule(hysteresis=0.1, momentum=0.0)
    run(arm, 0.2, 3)
    assert arm.rising
    before = arm.beta
    assert run(arm, 0.35, 3) == pytest.approx(before + 0.3)
    arm.update(batch(0.41))
    assert not arm.rising and arm.beta < before + 0.3


def test_recovery_lets_beta_decay_to_its_base_exactly():
    arm = schedule(momentum=0.0)
    run(arm, 0.2, 5)
    high = arm.beta
    arm.update(batch(0.8))
    assert arm.beta == pytest.approx(0.5 + (high - 0.5) * 0.95)
    assert run(arm, 0.8, 100) == 0.5


def test_a_passing_dip_does_not_lock_beta_at_its_maximum():
    """S_c is 0.4 at the base, and falls by 0.3 for each unit of beta: at beta_max it is below tau_train for good."""
    arm = schedule()
    history = []
    for step in range(1000):
        dip = 0.3 if 50 <= step < 80 else 0.0
        arm.update(batch(0.4 - dip - 0.3 * (arm.beta - 0.5)))
        history.append(arm.beta)
    assert max(history) > 1.0, "the dip must be answered"
    assert history[300:] == [0.5] * 700, "and forgotten"


def test_what_was_seen_at_a_high_beta_does_not_start_the_next_rise():
    """The average looks back 50 updates, beta is down again in 5: those 50 were made by the high beta itself."""
    arm = schedule(momentum=0.98, decay=0.5)
    history = []
    for step in range(400):
        arm.update(batch((0.1 if step < 60 else 0.4) - (arm.beta - 0.5)))
        history.append(arm.beta)
    assert max(history) == 2.0
    assert history[150:] == [0.5] * 250


@pytest.mark.parametrize("gain", [0.05, 0.3, 1.0, 5.0])
def test_under_feedback_of_any_strength_beta_keeps_coming_back(gain):
    """A model that stays too weak even at the base: beta rises again and again, but never stays up."""
    arm = schedule()
    history = []
    for _ in range(1200):
        arm.update(batch(max(-1.0, 0.25 - gain * (arm.beta - 0.5))))
        history.append(arm.beta)
    for start in range(0, 1200, 300):
        assert min(history[start : start + 300]) == 0.5 and max(history[start : start + 300]) == 2.0


@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=4), min_size=1, max_size=120),
    st.floats(0, 1),
    st.floats(0, 3),
    st.floats(0.01, 5),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.5, 0.9]),
)
@settings(deadline=None, max_examples=50)
def test_beta_is_always_between_base_and_maximum(batches, beta, room, step, hold, momentum):
    arm = ARMSchedule(0.3, beta, beta + room, step, momentum=momentum, hold=hold, variance_max=0.2)
    for scores in batches:
        arm.update(torch.tensor(scores))
        assert beta <= arm.beta <= beta + room
        assert -1 - 1e-9 <= arm.mean <= 1 + 1e-9 and 0 <= arm.variance <= 1 + 1e-9


@given(st.integers(0, 120), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_a_restored_schedule_continues_exactly(updates, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = schedule(hold=5)
    for _ in range(updates):
        whole.update(torch.rand(4, generator=generator) - 0.3)
    restored = schedule(hold=5)
    restored.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert restored.state_dict() == whole.state_dict()
    for _ in range(60):
        scores = torch.rand(4, generator=generator) - 0.3
        whole.update(scores)
        restored.update(scores)
        assert restored.state_dict() == whole.state_dict()


def test_averages_are_bias_corrected():
    arm = schedule()
    arm.update(batch(0.7, spread=0.1))
    assert arm.mean == pytest.approx(0.7)
    assert arm.variance == pytest.approx(batch(0.7, spread=0.1).double().var(correction=0).item())


@pytest.mark.parametrize("scores", [torch.tensor([0.2, float("nan")]), torch.tensor([float("inf")]), torch.empty(0)])
def test_a_broken_batch_is_refused_and_changes_nothing(scores):
    arm = schedule()
    run(arm, 0.2, 15)
    before = arm.state_dict()
    with pytest.raises(ValueError, match="NaN or infinite"):
        arm.update(scores)
    assert arm.state_dict() == before


def test_the_batch_is_not_held_by_its_graph():
    scores = torch.full((3,), 0.2, requires_grad=True)
    arm = schedule()
    arm.update(scores * 2)
    assert isinstance(arm.mean, float) and scores.grad is None


@pytest.mark.parametrize(
    "change",
    [
        {"tau_train": 1.5},
        {"beta": -0.1},
        {"beta_max": 0.4},
        {"beta_max": float("inf")},
        {"beta_step": 0.0},
        {"decay": 1.0},
        {"momentum": 1.0},
        {"hysteresis": -0.1},
        {"hold": -1},
        {"variance_max": 0.0},
        {"beta": float("nan")},
    ],
)
def test_bad_settings_are_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*expected"):
        schedule(**change)


def test_a_state_of_other_settings_is_refused():
    state = schedule().state_dict()
    with pytest.raises(ValueError, match="outside"):
        schedule(beta=0.0, beta_max=0.2).load_state_dict(state)
    with pytest.raises(ValueError, match="keys"):
        schedule().load_state_dict({"beta": 0.5})
