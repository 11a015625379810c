from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cuda_emulation
from cmai_fast.ops import backend
from implementations import IMPLEMENTATIONS, IN_USE, INTERPRETED, KERNELS, Implementation


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process for Triton's interpreter, what tests other implementations would only run a second time; and it is
    slow: what says nothing of it is marked `not_interpreted`, with the reason."""
    if INTERPRETED:
        ours = {"in_use", "implementation", "kernel"}
        other = [
            item
            for item in items
            if item.get_closest_marker("not_interpreted") or not ours & set(getattr(item, "fixturenames", ()))
        ]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in other]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is there."""
    return torch.device(request.param)


@pytest.fixture(params=IN_USE, scope="session")
def in_use(request: pytest.FixtureRequest) -> Implementation:
    """The public operators, with the backend that the environment or the device chooses."""
    return request.param


@pytest.fixture(params=KERNELS, scope="session")
def kernel(request: pytest.FixtureRequest) -> Implementation:
    """Every backend's kernels: a call that they do not carry fails."""
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS, scope="session")
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """The reference, the operators in use, and every backend's kernels."""
    return request.param


@pytest.fixture(scope="session")
def emulated() -> Any:
    """The CUDA kernels compiled for the host."""
    return cuda_emulation.module()


@pytest.fixture
def carried(in_use: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's kernels are in use, a call that they leave to the reference fails."""

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is left to the reference")

    if INTERPRETED or in_use.device == "cuda":
        backend.forget_choices()
        monkeypatch.setattr(backend, "_from_reference", refuse)
