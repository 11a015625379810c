import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmai_fast.arm import ARMSchedule, Range

WARM = 10  # 1 / (1 - momentum) for the default momentum
CLEAN, SPREAD = 0.4, 0.1  # S_c of clean images: tau_train is 0.35


def schedule(**change):
    """Of beta alone, from 0.5 to 2 by 0.1."""
    return ARMSchedule(**({"ranges": {"beta": Range(0.5, 2.0, 0.1)}} | change))


def batch(mean, spread=SPREAD):
    """Eight scores of this mean and standard deviation."""
    return mean + spread * torch.tensor([-1.0, 1.0]).repeat(4)


def run(arm, mean, updates, spread=SPREAD, clean=CLEAN):
    for _ in range(updates):
        arm.update(batch(mean, spread), batch(clean))
    return arm.value("beta")


def test_thresholds_come_from_clean_images_once_they_are_measured():
    arm = schedule()
    run(arm, 0.4, WARM - 1)
    assert arm.tau_train is None and arm.variance_max is None
    run(arm, 0.4, 1)
    assert arm.tau_train == pytest.approx(CLEAN - 0.5 * SPREAD)
    assert arm.variance_max == pytest.approx(1.5 * SPREAD**2)
    run(arm, 0.4, 200, clean=0.8)
    assert arm.tau_train == pytest.approx(0.75), "heads that learn move S_c of clean images, and tau_train with it"


def test_given_thresholds_are_kept():
    arm = schedule(tau_train=0.1, variance_max=0.5)
    run(arm, 0.2, 50)
    assert (arm.tau_train, arm.variance_max) == (0.1, 0.5)
    assert arm.level == 0, "below the clean images' threshold, above the given one"
    run(arm, 0.05, 20)
    assert arm.level > 0


def test_beta_stays_while_images_look_consistent():
    assert run(schedule(), 0.36, 200) == 0.5


def test_beta_rises_a_step_per_update_to_its_bound_when_they_do_not():
    arm = schedule()
    assert run(arm, 0.2, WARM - 1) == 0.5
    assert run(arm, 0.2, 1) == pytest.approx(0.6)
    assert run(arm, 0.2, 2) == pytest.approx(0.8)
    assert run(arm, 0.2, 12) == 2.0 and arm.level == 1
    assert run(arm, 0.2, 40) == 2.0


def test_high_variance_raises_beta_too():
    assert run(schedule(), 0.4, WARM + 2, spread=0.13) > 0.6
    assert run(schedule(), 0.4, 100, spread=0.12) == 0.5, "1.44 times the clean variance"
    assert run(schedule(variance_max=1.0), 0.4, 100, spread=0.5) == 0.5


def test_the_variance_is_that_between_samples_whatever_the_batch():
    arm = schedule()
    for i in range(400):
        arm.update(batch(0.4)[i % 2 : i % 2 + 1], batch(CLEAN)[i % 2 : i % 2 + 1])
    assert arm.variance == pytest.approx(SPREAD**2, rel=0.02)


def test_every_setting_moves_between_its_base_and_its_bound():
    arm = ARMSchedule({"beta": Range(0.3, 1.0), "eps": Range(8 / 255, 12 / 255), "lam": Range(0.5, 0.5)})
    run(arm, 0.2, WARM + 9)
    assert arm.level == pytest.approx(0.5)
    values = arm.value("beta"), arm.value("eps"), arm.value("lam")
    assert values == pytest.approx((0.65, 10 / 255, 0.5))
    run(arm, 0.2, 10)
    assert (arm.value("beta"), arm.value("eps")) == (1.0, 12 / 255)


def test_each_setting_has_its_own_step():
    arm = ARMSchedule({"beta": Range(0.0, 1.0, 0.1), "lam": Range(0.5, 0.9, 0.2), "eps": Range(0.1, 0.2, 5.0)})
    seen = []
    for _ in range(WARM + 9):
        run(arm, 0.2, 1)
        seen.append((arm.value("beta"), arm.value("lam"), arm.value("eps")))
    assert seen[WARM - 2] == (0.0, 0.5, 0.1)
    assert seen[WARM - 1] == pytest.approx((0.1, 0.7, 0.2)), "a step beyond the bound ends at it"
    assert seen[WARM] == pytest.approx((0.2, 0.9, 0.2))
    assert seen[-1] == (1.0, 0.9, 0.2)


@pytest.mark.parametrize("bound", [None, 0.5, 0.2])
def test_a_setting_without_room_is_not_moved(bound):
    arm = ARMSchedule({"beta": Range(0.5, bound)})
    assert run(arm, 0.0, 100) == 0.5 and arm.level == 0 and not arm.rising


def test_heads_that_have_yet_to_learn_start_nothing():
    arm = schedule(wait=60)
    assert run(arm, 0.0, 59) == 0.5 and arm.tau_train is None
    assert run(arm, 0.0, 1) == pytest.approx(0.6)


def test_between_the_two_marks_nothing_starts_and_nothing_ends():
    assert run(schedule(), 0.36, 50) == 0.5
    arm = schedule(momentum=0.0)
    run(arm, 0.2, 3)
    assert arm.rising
    before = arm.value("beta")
    assert run(arm, 0.37, 3) == pytest.approx(before + 0.3)
    run(arm, 0.38, 1)
    assert not arm.rising and arm.value("beta") < before + 0.3


def test_recovery_lets_beta_decay_to_its_base_exactly():
    arm = schedule(momentum=0.0)
    high = run(arm, 0.2, 5)
    assert run(arm, 0.8, 1) == pytest.approx(0.5 + (high - 0.5) * 0.95)
    assert run(arm, 0.8, 100) == 0.5


def test_a_passing_dip_does_not_lock_beta_at_its_bound():
    """S_c is 0.4 at the base, and falls by 0.3 per unit of beta: at the bound it is below tau_train for good."""
    arm = schedule()
    history = []
    for step in range(1000):
        dip = 0.3 if 50 <= step < 80 else 0.0
        history.append(run(arm, 0.4 - dip - 0.3 * (arm.value("beta") - 0.5), 1))
    assert max(history) > 1.0, "the dip must be answered"
    assert history[300:] == [0.5] * 700, "and forgotten"


def test_what_was_seen_at_a_high_beta_does_not_start_the_next_rise():
    """The average looks back 50 updates, beta is down again in 5: those 50 were made by the high beta itself."""
    arm = schedule(momentum=0.98, decay=0.5, tau_train=0.3)
    history = []
    for step in range(400):
        history.append(run(arm, (0.1 if step < 60 else 0.4) - (arm.value("beta") - 0.5), 1))
    assert max(history) == 2.0
    assert history[150:] == [0.5] * 250


@pytest.mark.parametrize("gain", [0.05, 0.3, 1.0, 5.0])
def test_under_feedback_of_any_strength_beta_keeps_coming_back(gain):
    """A model that stays too weak even at the base: beta rises again and again, but never stays up."""
    arm = schedule()
    history = []
    for _ in range(1200):
        history.append(run(arm, max(-1.0, 0.25 - gain * (arm.value("beta") - 0.5)), 1))
    for start in range(0, 1200, 300):
        assert min(history[start : start + 300]) == 0.5 and max(history[start : start + 300]) == 2.0


@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=4), min_size=1, max_size=120),
    st.floats(0, 1),
    st.floats(0, 3),
    st.floats(0.01, 5) | st.none(),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.5, 0.9]),
)
@settings(deadline=None, max_examples=50)
def test_settings_are_always_between_base_and_bound(batches, base, room, step, hold, momentum):
    ranges = {"beta": Range(base, base + room, step), "lam": Range(0.5, 0.75)}
    arm = ARMSchedule(ranges, momentum=momentum, hold=hold)
    for scores in batches:
        arm.update(torch.tensor(scores[1:]), torch.tensor(scores[:1]))
        assert base <= arm.value("beta") <= base + room and 0.5 <= arm.value("lam") <= 0.75
        assert 0 <= arm.level <= 1


@given(st.integers(0, 120), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_a_restored_schedule_continues_exactly(updates, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = schedule(hold=5)
    for _ in range(updates):
        whole.update(torch.rand(4, generator=generator) - 0.3, torch.rand(4, generator=generator))
    restored = schedule(hold=5)
    restored.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert restored.state_dict() == whole.state_dict()
    for _ in range(60):
        scores = torch.rand(4, generator=generator) - 0.3, torch.rand(4, generator=generator)
        whole.update(*scores)
        restored.update(*scores)
        assert restored.state_dict() == whole.state_dict()


def test_averages_are_bias_corrected():
    arm = schedule()
    run(arm, 0.7, 1)
    assert (arm.mean, arm.variance) == pytest.approx((0.7, SPREAD**2))


@pytest.mark.parametrize("scores", [torch.tensor([0.2, float("nan")]), torch.tensor([float("inf")]), torch.empty(0)])
@pytest.mark.parametrize("of", ["adversarial", "clean"])
def test_broken_scores_are_refused_and_change_nothing(scores, of):
    arm = schedule()
    run(arm, 0.2, 15)
    before = arm.state_dict()
    with pytest.raises(ValueError, match=f"{of} images with . NaN or infinite; expected"):
        arm.update(**({"adversarial": batch(0.2), "clean": batch(CLEAN)} | {of: scores}))
    assert arm.state_dict() == before


def test_the_batch_is_not_held_by_its_graph():
    scores = torch.full((3,), 0.2, requires_grad=True)
    arm = schedule()
    arm.update(scores * 2, scores * 3)
    assert isinstance(arm.mean, float) and scores.grad is None


def test_changed_settings_are_followed():
    arm = schedule()
    run(arm, 0.2, WARM + 14)
    assert arm.value("beta") == 2.0
    arm.follow({"beta": Range(0.3, 0.9), "lam": Range(0.5, 0.6)})
    assert (arm.value("beta"), arm.value("lam")) == (0.9, 0.6)
    with pytest.raises(ValueError, match="tau_train is 3"):
        arm.follow({}, tau_train=3)
    assert arm.value("beta") == 0.9
    arm.follow({"beta": Range(0.3)})
    assert arm.value("beta") == 0.3
    run(arm, 0.2, 100)
    assert arm.level == 0


@pytest.mark.parametrize(
    "change",
    [
        {"tau_train": 1.5},
        {"variance_max": 0.0},
        {"wait": -1},
        {"decay": 1.0},
        {"momentum": 1.0},
        {"hold": -1},
    ],
)
def test_bad_settings_are_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*expected"):
        schedule(**change)


@pytest.mark.parametrize(
    "change", [{"base": float("nan")}, {"bound": float("inf")}, {"step": 0.0}, {"step": float("inf")}]
)
def test_bad_ranges_are_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} of a range is .*expected"):
        Range(**({"base": 0.1, "bound": 1.0} | change))


def test_a_state_of_another_version_is_refused():
    arm = schedule()
    with pytest.raises(ValueError, match=r"keys \['beta'\].*another version.*arm=False"):
        arm.load_state_dict({"beta": 0.5})
    with pytest.raises(ValueError, match="level of ARM is 2"):
        arm.load_state_dict(arm.state_dict() | {"level": 2})
