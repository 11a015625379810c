"""random_start_: the distribution it promises, and that a sample's noise is the sample's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.ops import reference
from implementations import Implementation

NORMS = ["linf", "l2"]


def noise(
    rows: int,
    shape: tuple[int, ...],
    norm: str,
    *,
    seed: int = 0,
    eps: float = 1.0,
    ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    by: Implementation | None = None,
) -> Tensor:
    """(rows, elements) noise around 0, with a box too wide to cut it."""
    adv = torch.full((rows, *shape), float("nan"), dtype=dtype)
    ids = torch.arange(rows) if ids is None else ids
    start = ops.random_start_ if by is None else by("random_start_")
    start(adv, torch.zeros_like(adv), torch.full((rows,), eps), ids, seed, norm, -9, 9)
    return adv.flatten(1)


def kolmogorov_smirnov(values: Tensor) -> float:
    """sqrt(n) times the largest distance from the uniform distribution on [0, 1]; above 1.95 with probability 0.001."""
    values = values.double().flatten().sort().values
    grid = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    return max((grid - values).max().item(), (values - grid + 1 / len(values)).max().item()) * math.sqrt(len(values))


def test_linf_is_uniform() -> None:
    assert kolmogorov_smirnov((noise(64, (3, 40, 40), "linf", eps=0.1) / 0.1 + 1) / 2) < 1.95


@pytest.mark.parametrize("size", [2, 5, 48])
def test_l2_is_uniform_in_the_volume(size: int) -> None:
    delta = noise(20_000, (size,), "l2", eps=0.5)
    radius = delta.double().norm(dim=1)
    assert radius.max() <= 0.5 * (1 + 1e-6)
    # The share of the volume inside the radius, and by symmetry every coordinate's mean and covariance (r^2 / (d + 2)).
    assert kolmogorov_smirnov((radius / 0.5) ** size) < 1.95
    spread = math.sqrt(0.25 / (size + 2))
    assert (delta.mean(0).abs() < 5 * spread / math.sqrt(20_000)).all()
    covariance = delta.T.double() @ delta.double() / 20_000 / spread**2
    assert (covariance - torch.eye(size)).abs().max() < 0.06


def test_l2_directions_in_the_plane_are_uniform() -> None:
    delta = noise(20_000, (2,), "l2")
    assert kolmogorov_smirnov(torch.atan2(delta[:, 1], delta[:, 0]) / (2 * math.pi) + 0.5) < 1.95


@pytest.mark.parametrize("norm", NORMS)
def test_neighbours_in_element_sample_and_seed_are_independent(norm: str) -> None:
    first = noise(200, (500,), norm)
    pairs = {
        "element": (first[:, 1:], first[:, :-1]),
        "sample": (first[1:], first[:-1]),
        "seed": (first, noise(200, (500,), norm, seed=1)),
        "seed and sample exchanged": (
            noise(1, (500,), norm, seed=3, ids=torch.tensor([5])),
            noise(1, (500,), norm, seed=5, ids=torch.tensor([3])),
        ),
    }
    for name, (a, b) in pairs.items():
        correlation = (a * b).mean() / (a.std() * b.std())
        assert correlation.abs() < 4.5 / math.sqrt(a.numel()), f"{name}: correlation {correlation:.4f}"


@pytest.mark.parametrize("clean", [torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (3, 41, 53)])
@pytest.mark.parametrize("norm", NORMS)
def test_kernels_give_what_the_reference_gives(
    kernel: Implementation, norm: str, shape: tuple[int, ...], clean: torch.dtype
) -> None:
    centre = (torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * 255).round()
    centre = centre.to(clean) if clean == torch.uint8 else centre / 255
    results = []
    for start in (kernel("random_start_"), reference.random_start_):
        adv = torch.full((3, *shape), float("nan"))
        start(adv, centre, torch.tensor([0.01, 0.2, 3.0]), torch.tensor([9, -1, 2**40]), -7, norm)
        results.append(adv)
    if norm == "linf":
        assert torch.equal(*results)
    else:
        torch.testing.assert_close(*results, atol=2e-6, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_does_not_depend_on_the_batch(
    implementation: Implementation, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(ids: Tensor) -> Tensor:
        return noise(len(ids), (3, 37, 47), norm, seed=11, ids=ids, by=implementation)

    ids = torch.tensor([7, 123_456_789_012, 0, -3])
    batch = of(ids)
    for row in range(4):
        assert torch.equal(of(ids[row : row + 1])[0], batch[row])
    assert torch.equal(of(ids.flip(0)), batch.flip(0))
    monkeypatch.setattr(reference, "_CHUNK", 12_000)
    assert torch.equal(of(ids), batch)


@pytest.mark.parametrize("norm", NORMS)
def test_the_global_generator_is_neither_read_nor_moved(norm: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = noise(2, (9,), norm)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(noise(2, (9,), norm), first)


def test_known_values(implementation: Implementation) -> None:
    """The stream is part of the contract: a change would silently change every published attack."""
    step, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(bits: int) -> int:
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        return bits ^ (bits >> 31)

    assert mix(step) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 from state 0, as published
    seed, sample = -5, 42
    start = mix(mix((seed + step) & mask) ^ mix(sample))
    right = [((mix((start + i * step) & mask) >> 40) * 2 + 1 - 2**24) / 2**24 for i in range(1, 7)]
    got = noise(1, (6,), "linf", seed=seed, ids=torch.tensor([sample]), by=implementation)
    assert got.flatten().tolist() == right


@pytest.mark.parametrize("norm", NORMS)
def test_float64_has_the_same_noise(norm: str) -> None:
    single, double = noise(3, (31,), norm), noise(3, (31,), norm, dtype=torch.float64)
    torch.testing.assert_close(single.double(), double, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_start_is_inside_ball_and_box_with_a_radius_per_row(implementation: Implementation, norm: str) -> None:
    clean = torch.rand(5, 3, 8, 8)
    adv, eps = torch.empty_like(clean), torch.tensor([0.0, 0.01, 0.1, 0.5, 2.0])
    implementation("random_start_")(adv, clean, eps, torch.arange(5), 3, norm)
    assert adv.min() >= 0 and adv.max() <= 1
    delta = (adv - clean).double().flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps + 2**-24 * (1 if norm == "linf" else delta.shape[1] ** 0.5)).all()
    assert size[0] == 0 and (size[1:] > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_non_contiguous_and_empty(in_use: Implementation, norm: str) -> None:
    right = noise(2, (4, 6), norm, by=in_use).view(2, 4, 6)
    buffer = torch.full((2, 4, 12), 5.0)
    in_use("random_start_")(buffer[..., ::2], torch.zeros(2, 4, 6), torch.ones(2), torch.arange(2), 0, norm, -9, 9)
    torch.testing.assert_close(buffer[..., ::2], right, atol=1e-6, rtol=0)
    assert (buffer[..., 1::2] == 5).all()
    assert noise(0, (3, 4), norm, by=in_use).shape == (0, 12)


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm: str) -> None:
    arguments = (torch.zeros(2, 3, 4), torch.rand(2, 3, 4), torch.rand(2), torch.arange(2), 1, norm)
    torch.library.opcheck(torch.ops.cmai_fast.random_start_.default, arguments)


def test_wrong_arguments_are_named() -> None:
    clean, ids = torch.rand(2, 3), torch.arange(2)
    with pytest.raises(RuntimeError, match="norm is 'l1', expected 'linf' or 'l2'"):
        ops.random_start_(clean.clone(), clean, torch.rand(2), ids, 0, "l1")
    with pytest.raises(RuntimeError, match=r"sample_ids has dtype torch.int32"):
        ops.random_start_(clean.clone(), clean, torch.rand(2), ids.int(), 0, "linf")
    with pytest.raises(RuntimeError, match=r"sample_ids has shape \(3,\), expected \(2,\)"):
        ops.random_start_(clean.clone(), clean, torch.rand(2), torch.arange(3), 0, "linf")
