"""The choice of a backend: by the environment, by what is there, and by what the tensors are."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from cmai_fast import ops
from cmai_fast.ops import backend, cpu, reference


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CMAI_FAST_BACKEND", raising=False)
    backend.chosen_backend.cache_clear()
    yield
    backend.chosen_backend.cache_clear()


def step(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    clean = torch.full((1, 4), 0.5, dtype=dtype)
    adv = clean.clone()
    ops.pgd_linf_step_(adv, torch.ones_like(adv), clean, torch.tensor([0.5]), torch.tensor([0.25]))
    return adv


def test_the_extension_is_built_and_chosen() -> None:
    assert ops.backend_report()["cpu"] == "ready", "build it: python setup.py build_ext --inplace"
    assert ops.chosen_backend() == "cpu"


def test_the_cpu_backend_runs_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(cpu, "_run", lambda kernel, *args: ran.append(kernel))
    step()
    assert ran == ["pgd_linf_step"]
    step(torch.float64)  # not carried: the reference runs
    assert ran == ["pgd_linf_step"]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_explicit_backends_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAI_FAST_BACKEND", name)
    assert ops.chosen_backend() == name
    assert torch.equal(step(), torch.full((1, 4), 0.75))


def test_explicit_reference_does_not_touch_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAI_FAST_BACKEND", "reference")
    monkeypatch.setattr(cpu, "_run", lambda *args: pytest.fail("the C++ kernel ran"))
    step()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("triton", "CMAI_FAST_BACKEND=triton cannot be had: this build has no Triton kernels"),
        ("cuda", "CMAI_FAST_BACKEND=cuda cannot be had: this build has no CUDA kernels"),
        ("CPU", "CMAI_FAST_BACKEND='CPU' is no backend; choose one of reference, cpu, triton, cuda"),
    ],
)
def test_a_backend_that_cannot_be_had_raises(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAI_FAST_BACKEND", name)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reason):
            step()
    with pytest.raises(RuntimeError, match=reason):
        ops.cosine_heads(torch.ones(1, 1, 2), torch.ones(1, 1, 2))


def test_the_variable_is_read_from_the_environment_of_the_process() -> None:
    code = (
        "import torch, cmai_fast.ops as ops; print(ops.backend_report()['triton']);"
        "ops.cosine_heads(torch.ones(1, 1, 2), torch.ones(1, 1, 2))"
    )
    environment = {**os.environ, "CMAI_FAST_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout.strip() == "this build has no Triton kernels"
    assert "RuntimeError: CMAI_FAST_BACKEND=triton cannot be had" in done.stderr


def test_without_the_extension_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler was there")
    with pytest.warns(RuntimeWarning, match="reference operators: no compiler was there"):
        first = step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(step(), first)
    assert ops.chosen_backend() == "reference"


def test_without_the_extension_the_explicit_cpu_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAI_FAST_BACKEND", "cpu")
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler was there")
    with pytest.raises(
        RuntimeError, match=r"cpu cannot be had: no compiler was there. Unset it, or choose one of: ref"
    ):
        step()


def test_every_operator_has_a_reference() -> None:
    from cmai_fast.ops.schema import CHECKS, SCHEMAS

    assert set(SCHEMAS) == set(CHECKS)
    assert all(callable(getattr(reference, name)) for name in SCHEMAS)
