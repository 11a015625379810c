"""On a linear model every attack must reach the optimum that can be written down; nowhere may it leave ball or box."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmai_fast.attacks import ATTACKS
from cmai_fast.attacks.apgd import apgd
from cmai_fast.attacks.fgsm import fgsm
from cmai_fast.attacks.mi_fgsm import mi_fgsm
from cmai_fast.attacks.pgd import pgd
from cmai_fast.pixels import round_to_8bit
from cmai_fast.threat import ThreatModel
from linear_bridge import SHAPE, LinearBridge
from unguarded import UNGUARDED

INNER = 0.4 + 0.2 * torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def optimum(bridge: LinearBridge, threat: ThreatModel) -> torch.Tensor:
    g = bridge.direction()
    return threat.eps * (g.sign() if threat.norm == "linf" else g / g.norm())


@pytest.mark.parametrize("norm, eps", [("linf", 16 / 255), ("l2", 0.3)])
@pytest.mark.parametrize(
    "attack",
    [
        lambda *a: fgsm(*a),
        lambda *a: pgd(*a, steps=10, random_start=False),
        lambda *a: pgd(*a, steps=60, step_size=a[2].eps, seed=5, early_stop=False),
        lambda *a: mi_fgsm(*a, steps=10),
        lambda *a: apgd(*a, steps=50, seed=5),
    ],
    ids=["fgsm", "pgd from clean", "pgd last iterate", "mi-fgsm", "apgd"],
)
def test_the_closed_form_optimum_is_reached(attack, norm, eps):
    bridge, threat = LinearBridge(), ThreatModel(norm, eps)
    result = attack(bridge.victim(2), INNER, threat)
    assert not result.fooled.any()  # the bias keeps the label right, so nothing stops early
    torch.testing.assert_close(
        result.adv - INNER, optimum(bridge, threat).expand(2, *SHAPE), rtol=0, atol=1e-9 if norm == "linf" else 1e-6
    )


def test_in_the_corner_of_the_box_the_linf_optimum_is_the_clamped_one():
    bridge = LinearBridge()
    clean = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)]).double()
    result = pgd(bridge.victim(2), clean, ThreatModel("linf", 0.1), steps=10)
    expected = (clean + optimum(bridge, ThreatModel("linf", 0.1))).clamp(0, 1)
    torch.testing.assert_close(result.adv, expected, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(UNGUARDED),
    norm=st.sampled_from(["linf", "l2"]),
    levels=st.sampled_from([0.0, 0.5, 1.0, 8.0, 24.0, 255.0]),
    steps=st.integers(1, 6),
    seed=st.integers(-(2**40), 2**40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bias=st.sampled_from([-8.0, 0.0]),
    border=st.floats(0, 1),
)
def test_every_result_is_in_ball_and_box_also_after_rounding(name, norm, levels, steps, seed, dtype, bias, border):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 256, (3, *SHAPE), generator=generator)
    clean = (
        torch.where(torch.rand(clean.shape, generator=generator) < border, clean // 128 * 255, clean).to(dtype) / 255
    )
    threat = ThreatModel(norm, levels / 255)
    bridge = LinearBridge(dtype, bias)
    result = ATTACKS[name](bridge.victim(3), clean, threat, steps=1 if name == "fgsm" else steps, seed=seed)
    assert result.adv.dtype == dtype and result.adv.shape == clean.shape
    assert result.adv.min() >= 0 and result.adv.max() <= 1
    slack = 1e-12 if dtype == torch.float64 else 2.0**-24 * (1 if norm == "linf" else 48**0.5)
    assert (threat.distance(result.adv.double() - clean.double()) <= threat.eps + slack).all()
    rounded = (round_to_8bit(result.adv, clean, threat).double() * 255).round()
    assert (threat.distance(rounded - (clean.double() * 255).round()) <= levels + 1e-6).all()
    assert rounded.min() >= 0 and rounded.max() <= 255


@pytest.mark.parametrize("name", UNGUARDED)
def test_nothing_moves_without_a_ball(name):
    result = ATTACKS[name](LinearBridge().victim(2), INNER, ThreatModel("linf", 0.0), steps=1)
    assert torch.equal(result.adv, INNER)
