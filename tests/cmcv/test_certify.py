from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from cmai_fast.cmcv.certify import certify, lower_bound


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("failure_rate", [0.001, 0.05])
def test_the_bound_is_the_quantile_of_a_beta_distribution(n, failure_rate):
    from scipy.stats import beta

    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        expected = beta.ppf(failure_rate, k, n - k + 1) if k else 0.0
        assert lower_bound(k, n, failure_rate) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("p", [0.55, 0.9, 0.95])
def test_the_bound_is_wrong_as_often_as_stated(p):
    n, rate, seeds = 200, 0.1, 4000
    counts = np.random.default_rng(0).binomial(n, p, size=seeds)
    bounds = {k: lower_bound(int(k), n, rate) for k in set(counts.tolist())}
    wrong = sum(bounds[k] > p for k in counts.tolist()) / seeds
    assert wrong <= rate + 3 * math.sqrt(rate * (1 - rate) / seeds)
    assert wrong >= rate / 4, "a bound that is hardly ever wrong is loose"


def linear(weights, distance):
    """A decision whose hyperplane is `distance` from 0; the smoothed one has the same hyperplane."""
    unit = weights / weights.norm()
    return lambda x: x.flatten(1) @ unit.flatten() + distance > 0


@pytest.mark.parametrize("distance", [0.5, -0.5])
def test_the_radius_approaches_the_distance_to_a_hyperplane(distance):
    x, weights = torch.zeros(2, 3, 4), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    radii = []
    for n in (100, 1000, 50_000):
        found = certify(
            linear(weights, distance), x, sigma=0.5, n=n, batch_size=10_000,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        assert found.accepts is (distance > 0) and found.n == n
        radii.append(found.radius)
    assert radii[0] < radii[1] < radii[2] < 0.5 and radii[2] > 0.48


def test_certified_radii_of_linear_scores_are_too_large_as_rarely_as_stated():
    decision, x = linear(torch.ones(5), 0.3), torch.zeros(5)
    wrong = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        found = certify(decision, x, sigma=0.5, n0=20, n=100, failure_rate=0.05, batch_size=100, generator=generator)
        wrong += found.radius > 0.3 or found.accepts is False
    assert wrong / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_it_abstains_at_the_hyperplane():
    found = certify(linear(torch.ones(5), 0.0), torch.zeros(5), sigma=0.5, generator=torch.Generator().manual_seed(0))
    assert found.accepts is None and found.radius == 0 and found.p_lower <= 0.5
    assert found.to_dict()["accepts"] is None


def test_all_draws_agreeing_gives_the_largest_radius():
    found = certify(lambda x: torch.ones(len(x), dtype=torch.bool), torch.zeros(3), sigma=0.25)
    assert found.agreeing == 1000
    assert found.radius == pytest.approx(0.25 * NormalDist().inv_cdf(0.001 ** (1 / 1000)))


def test_an_attack_inside_the_radius_does_not_flip_an_accepted_answer():
    generator, sigma = torch.Generator().manual_seed(0), 0.4
    with torch.random.fork_rng():
        torch.manual_seed(3)
        score = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    score[2].bias.data.zero_()

    def accepted(x):
        with torch.no_grad():
            return score(x).squeeze(-1) > 0

    tried = outside = 0
    for x in torch.randn(12, 8, generator=generator):
        found = certify(accepted, x, sigma=sigma, n=2000, batch_size=2000, generator=generator)
        if not found.accepts:
            continue

        def attacked(radius, x=x):
            """PGD on a smooth version of the share of noised inputs that are accepted."""
            delta = torch.zeros_like(x)
            for _ in range(40):
                delta.requires_grad_()
                noised = x + delta + sigma * torch.randn(256, 8, generator=generator)
                (grad,) = torch.autograd.grad(torch.sigmoid(20 * score(noised)).mean(), delta)
                delta = (delta - radius / 5 * grad / grad.norm()).detach()
                delta = delta * min(1.0, radius / float(delta.norm()))
            return accepted(x + delta + sigma * torch.randn(20_000, 8, generator=generator)).float().mean().item()

        tried += 1
        assert attacked(0.999 * found.radius) > 0.5
        outside += attacked(4 * found.radius + 1.0) < 0.5
    assert tried >= 4 and outside >= tried - 1, "the attack is strong enough to flip it farther away"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"sigma": 1.0, "n": 5}, "n is 5, too few draws .*expected at least 11"),
        ({"sigma": 1.0, "failure_rate": 0.7}, "failure_rate is 0.7"),
        ({"sigma": 1.0, "n0": 0}, "n0 is 0"),
    ],
)
def test_bad_numbers_are_named(settings, message):
    with pytest.raises(ValueError, match=f"certify: {message}"):
        certify(lambda x: x, torch.zeros(1), **settings)
    with pytest.raises(ValueError, match="3 successes of 2"):
        lower_bound(3, 2, 0.1)
