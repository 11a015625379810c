"""The CUDA backend: when it can run, and the arithmetic of its kernels that small images do not reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmai_fast import ops
from cmai_fast.ops import cpu, cuda
from cmai_fast.ops.signatures import ApgdStep, PgdStep, RandomStart

GPU = pytest.mark.skipif(cuda.unavailable() is not None, reason=f"no CUDA backend here: {cuda.unavailable()}")


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        ({"BUILD": {"cuda": "none: nvcc was not found"}}, "built without CUDA: nvcc was not found; rebuild with"),
        ({"cuda_no_device": lambda: "driver is too old"}, "no CUDA device or driver: driver is too old"),
    ],
)
def test_the_reason_why_it_cannot_run(extension: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_C", SimpleNamespace(**extension))
    reason = cuda.unavailable.__wrapped__()
    assert reason is not None and reason.startswith(message)


def test_without_a_pytorch_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_C", SimpleNamespace(cuda_no_device=lambda: ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cannot use CUDA" in (cuda.unavailable.__wrapped__() or "")


@pytest.mark.parametrize(
    ("architectures", "capability", "right"),
    [
        ("80;90;100", (8, 0), True),
        ("80;90;100", (8, 9), True),  # by the machine code of 8.0
        ("80;90;100", (12, 0), True),  # by PTX
        ("80;90;100", (7, 5), False),
        ("90", (8, 0), False),
        ("86", (8, 0), False),
        ("80;86", (9, 0), True),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100;80", (9, 0), True),  # PTX of the last that was named
    ],
)
def test_which_devices_a_build_covers(architectures: str, capability: tuple[int, int], right: bool) -> None:
    assert cuda.covers(architectures, capability) == right


@pytest.mark.parametrize("planners", [cuda.KERNELS, cpu.KERNELS], ids=["cuda", "cpu"])
def test_tensors_elsewhere_are_not_carried(planners: dict[str, Any]) -> None:
    image, row = torch.empty(2, 3, device="meta"), torch.empty(2, device="meta")
    flags = torch.empty(2, dtype=torch.bool, device="meta")
    for name in ("pgd_linf_step_", "pgd_l2_step_"):
        assert planners[name](PgdStep(image, image, image, row, row)) is None
    for name in ("apgd_linf_step_", "apgd_l2_step_"):
        assert planners[name](ApgdStep(*[image] * 6, row, row, flags, flags, 0.75)) is None
    assert planners["random_start_"](RandomStart(image, image, row, flags, 0, "l2")) is None
    assert planners["gated_activation"](image) is None
    assert planners["gated_activation_backward"](image, image, None, "silu") is None


def layout(rows: int, patches: int, channels: int, inner: int) -> Any:
    return cpu._C.Layout(rows=rows, patches=patches, channels=channels, inner=inner, grad=0, clean=0, model_input=0,
                         lower=0, upper=1)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "right"),
    [
        ((2**31 - 1, 1, 1, 1), True),
        ((2**31, 1, 1, 1), False),  # more blocks than a grid takes
        ((1, 1, 1, 2**40), True),
        ((2**20, 1, 1, 2**22), False),
        ((1, 2**20, 3, 2**20), True),
        ((1, 1, 3, 2**30), False),  # channels beyond 32 bits
    ],
)
def test_the_largest_batches(emulated: Any, sizes: tuple[int, int, int, int], right: bool) -> None:
    assert emulated.cuda_carries(layout(*sizes)) == right


def test_scratch_memory_of_a_batch(emulated: Any) -> None:
    # Three sums a tile and two results a row, of doubles.
    assert emulated.cuda_scratch_size(layout(5, 1, 1, 2 * emulated.TILE + 1)) == 5 * (3 * 3 + 2)


@settings(max_examples=2000, deadline=None)
@given(n=st.integers(0, 2**31 - 1), divisor=st.integers(1, 2**31 - 1))
def test_division_by_multiplication(emulated: Any, n: int, divisor: int) -> None:
    near = max(0, n // divisor * divisor - 1)
    for number in (n, near, near + 1, 2**31 - 1):
        assert emulated.quotient(number, divisor) == number // divisor


def test_pixels_are_divided_to_the_last_bit(emulated: Any) -> None:
    right = torch.arange(256, dtype=torch.float32) / 255
    assert [emulated.pixel_value(pixel) for pixel in range(256)] == right.tolist()


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pgd_linf_step_", "pgd_l2_step_"])
def test_a_graph_records_a_step(name: str) -> None:
    clean = torch.rand(3, 3, 32, 32, device="cuda")
    grad, eps = torch.randn_like(clean), torch.full((3,), 0.1, device="cuda")
    step = getattr(ops, name)
    right = clean.clone()
    for _ in range(2):
        step(right, grad, clean, eps, eps / 4)
    adv = clean.clone()
    step(adv.clone(), grad, clean, eps, eps / 4)
    size = eps / 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(adv, grad, clean, eps, size)
    adv.copy_(clean)
    for _ in range(2):
        graph.replay()
    assert torch.equal(adv, right)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pgd_linf_step_", "pgd_l2_step_"])
def test_an_image_that_is_not_aligned(name: str) -> None:
    clean = torch.rand(2, 3, 64, 64, device="cuda")
    grad, eps = torch.randn_like(clean), torch.full((2,), 0.1, device="cuda")
    right, moved = clean.clone(), torch.empty(clean.numel() + 1, device="cuda")[1:].view(clean.shape).copy_(clean)
    for adv in (right, moved):
        getattr(ops, name)(adv, grad, clean, eps, eps / 4)
    assert torch.equal(moved, right)


@GPU
@pytest.mark.gpu
def test_steps_go_to_the_current_stream() -> None:
    clean = torch.rand(2, 3, 512, 512, device="cuda")
    eps, stream = torch.full((2,), 0.1, device="cuda"), torch.cuda.Stream()
    right = clean.clone()
    ops.pgd_linf_step_(right, torch.ones_like(clean), clean, eps, eps)
    adv, grad = clean.clone(), torch.zeros_like(clean)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grad.fill_(1)  # a step on another stream would not wait for it
        ops.pgd_linf_step_(adv, grad, clean, eps, eps)
    stream.synchronize()
    assert torch.equal(adv, right)


@GPU
@pytest.mark.gpu
def test_a_batch_of_more_than_2_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of memory")
    rows, size = 3, 2**30
    adv = torch.zeros(rows, size, device="cuda")
    eps = torch.full((rows,), 0.5, device="cuda")
    grad = torch.ones(rows, size, dtype=torch.bfloat16, device="cuda")
    ops.pgd_linf_step_(adv, grad, torch.zeros(rows, size, dtype=torch.uint8, device="cuda"), eps, eps / 2)
    assert (adv == 0.25).all()
