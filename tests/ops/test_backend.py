"""The choice of a backend: by the environment, by what is there, and by what the tensors are."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cmai_fast import ops
from cmai_fast.ops import backend, cpu, reference, triton_kernels
from cmai_fast.ops.signatures import STEPS


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CMAI_FAST_BACKEND", raising=False)
    backend.forget_choices()
    yield
    backend.forget_choices()


def step(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    clean = torch.full((1, 4), 0.5, dtype=dtype)
    adv = clean.clone()
    ops.pgd_linf_step_(adv, torch.ones_like(adv), clean, torch.tensor([0.5]), torch.tensor([0.25]))
    return adv


def test_the_extension_is_built_and_chosen() -> None:
    assert ops.backend_report()["cpu"] == "ready", "build it: python setup.py build_ext --inplace"
    assert ops.chosen_backend() == "automatic"
    assert backend.backends_for("cpu") == ("cpu",)


def record_plans(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the extension carried each call that it was asked about."""
    carried = []
    planner = cpu.KERNELS["pgd_linf_step_"]

    def recorded(*args: Any) -> Any:
        kernel = planner(*args)
        carried.append(kernel is not None)
        return kernel

    monkeypatch.setitem(cpu.KERNELS, "pgd_linf_step_", recorded)
    return carried


def test_the_cpu_backend_plans_once_for_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = record_plans(monkeypatch)
    for _ in range(3):
        step()
    assert carried == [True]
    step(torch.float64)  # not carried: the reference runs
    assert carried == [True, False]


def test_a_checked_signature_does_not_hide_one_tensor_in_two_roles() -> None:
    clean, eps = torch.full((1, 4), 0.5), torch.tensor([0.5])
    for size in (torch.tensor([0.25]), eps):
        ops.pgd_linf_step_(clean.clone(), torch.ones(1, 4), clean, eps, size)
    with pytest.raises(RuntimeError, match="adv and clean are the same tensor"):
        ops.pgd_linf_step_(clean, torch.ones(1, 4), clean, eps, eps)


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = record_plans(monkeypatch)
    monkeypatch.setattr(backend, "_MOST_PLANS", 3)
    for length in [1, 2, 3, 4, 5, 4]:
        image = torch.rand(1, length)
        ops.pgd_linf_step_(image.clone(), image + 1, image, torch.ones(1), torch.ones(1))
    assert len(carried) == 5 and all(len(plans) <= 3 for plans in backend._PLANS)


def test_modes_and_transforms_see_the_operator() -> None:
    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        step()
    assert "cmai_fast.pgd_linf_step_.default" in Seen.names
    with FakeTensorMode():
        adv, clean = torch.empty(2, 3), torch.empty(2, 3)
        ops.pgd_linf_step_(adv, torch.empty(2, 3), clean, torch.empty(2), torch.empty(2))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_explicit_backends_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = record_plans(monkeypatch)
    monkeypatch.setenv("CMAI_FAST_BACKEND", name)
    assert ops.chosen_backend() == name
    assert torch.equal(step(), torch.full((1, 4), 0.75))
    assert carried == ([True] if name == "cpu" else [])


def test_explicit_reference_does_not_touch_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAI_FAST_BACKEND", "reference")
    monkeypatch.setitem(cpu.KERNELS, "pgd_linf_step_", lambda *args: pytest.fail("the extension was asked"))
    step()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cpu", "CMAI_FAST_BACKEND=cpu is unavailable: no compiler was there. Unset it, or choose one of: reference"),
        ("CPU", "CMAI_FAST_BACKEND='CPU' is not a backend; choose one of reference, cpu, cuda, triton"),
    ],
)
def test_a_backend_that_cannot_be_had_raises(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAI_FAST_BACKEND", name)
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler was there")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reason):
            step()
    with pytest.raises(RuntimeError, match=reason):
        ops.cosine_heads(torch.ones(1, 1, 2), torch.ones(1, 1, 2))


def test_the_variable_is_read_from_the_environment_of_the_process() -> None:
    code = (
        "import torch, cmai_fast.ops as ops; print(ops.backend_report()['reference']);"
        "ops.cosine_heads(torch.ones(1, 1, 2), torch.ones(1, 1, 2))"
    )
    environment = {**os.environ, "CMAI_FAST_BACKEND": "gpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout.strip() == "ready"
    assert "RuntimeError: CMAI_FAST_BACKEND='gpu' is not a backend" in done.stderr


def test_without_the_extension_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler was there")
    with pytest.warns(RuntimeWarning, match="reference operators on cpu .cpu: no compiler was there"):
        first = step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(step(), first)
    assert backend.backends_for("cpu") == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.skipif(cpu._C is None or cpu._C.BUILD["openmp"] != "yes", reason="built without OpenMP")
def test_one_openmp_runtime_serves_pytorch_and_the_extension() -> None:
    """In a process of its own: other packages of the tests bring theirs."""
    code = """
import torch
def runtimes():
    names = {line.split()[-1] for line in open("/proc/self/maps") if line.count("/")}
    return {name for name in names if any(stem in name for stem in ("libgomp", "libomp", "libiomp"))}
before = runtimes()
from cmai_fast import ops
torch.set_num_threads(2)
adv = torch.zeros(2, 1 << 18)  # enough for several threads
ops.pgd_linf_step_(adv, adv + 1, adv.clone(), torch.ones(2), torch.ones(2))
assert (adv == 1).all()
print(len(before), runtimes() == before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["1", "True"], done.stdout
    # Not even by name: the runtime of another PyTorch may have another one.
    assert b"libgomp" not in Path(cpu._C.__file__).read_bytes()


@pytest.mark.parametrize(("name", "device"), [("cpu", "cuda"), ("triton", "cpu")])
def test_an_explicit_backend_does_not_take_tensors_of_another_device(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAI_FAST_BACKEND", name)
    monkeypatch.setattr(triton_kernels, "unavailable", lambda: None)
    with pytest.raises(RuntimeError, match=f"CMAI_FAST_BACKEND={name} is unavailable for tensors on {device}; unset"):
        backend.backends_for(device)


def test_every_operator_has_a_reference() -> None:
    from cmai_fast.ops.schema import CHECKS, SCHEMAS

    assert set(SCHEMAS) == set(CHECKS)
    assert all(callable(getattr(reference, name)) for name in SCHEMAS)


def test_triton_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.backend_report()["triton"] == "no CUDA device or driver"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ops.backend_report()["triton"] == "ready"
    assert backend.backends_for("cuda") == ("triton",) and backend.backends_for("cpu") == ("cpu",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ops.backend_report()["triton"] == "triton is not installed; pip install 'cmai-fast[triton]'"


def test_importing_the_operators_does_not_import_triton() -> None:
    code = "import sys, cmai_fast.ops; print(*sorted(name for name in sys.modules if name.startswith('triton')))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr


def test_a_tensor_that_is_not_what_its_memory_holds_is_read_right() -> None:
    clean, eps = torch.full((1, 4), 0.5), torch.tensor([0.5])
    ones = torch.ones(1, 4)
    for grad, right in ((torch._neg_view(ones), 0.25), (torch._efficientzerotensor((1, 4)), 0.5), (ones, 0.75)):
        adv = clean.clone()
        ops.pgd_linf_step_(adv, grad, clean, eps, eps / 2)
        assert torch.equal(adv, torch.full((1, 4), right))


def test_memory_in_two_roles_is_refused_by_its_address() -> None:
    images, eps = torch.full((3, 4), 0.5), torch.tensor([0.5, 0.5])
    for _ in range(2):  # also where a call of this signature was right before
        ops.pgd_linf_step_(
            images[:2].clone(), torch.ones(2, 4), images[:2], eps, eps / 2, model_input=torch.empty(2, 4)
        )
        with pytest.raises(RuntimeError, match="adv and clean are the same tensor or share memory"):
            ops.pgd_linf_step_(images[:2], torch.ones(2, 4), images[:2], eps, eps / 2, model_input=torch.empty(2, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.1}, "eps"),
        ({"mean": [0.5], "std": [0.5]}, "mean"),
        ({"patches": "two"}, "patches"),
        ({"lower": "black"}, "lower"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(changes: dict[str, Any], message: str) -> None:
    image, row = torch.full((1, 4), 0.5), torch.tensor([0.5])
    case = {"adv": image.clone(), "grad": image, "clean": image.clone(), "eps": row, "step": row / 2}
    with pytest.raises((RuntimeError, TypeError), match=rf"pgd_linf_step_.*{message}"):
        ops.pgd_linf_step_(**{**case, **changes})


# As they were when each was written out: a change of one breaks saved graphs and callers of `torch.ops`.
_SCHEMAS = {
    "pgd_l2_step_": (
        "(Tensor(a!) adv, Tensor grad, Tensor clean, Tensor eps, Tensor step, Tensor? active=None, "
        "Tensor(b!)? model_input=None, Tensor(c!)? velocity=None, float decay=1.0, Tensor(d!)? nonfinite=None, "
        "Tensor? mean=None, Tensor? std=None, int patches=1, float lower=0.0, float upper=1.0) -> ()"
    ),
    "apgd_linf_step_": (
        "(Tensor(a!) adv, Tensor(b!) previous, Tensor grad, Tensor(c!) top_adv, Tensor(d!) top_grad, Tensor clean, "
        "Tensor eps, Tensor step, Tensor improved, Tensor restart, float momentum, Tensor(e!)? model_input=None, "
        "Tensor(f!)? nonfinite=None, Tensor? mean=None, Tensor? std=None, int patches=1, float lower=0.0, "
        "float upper=1.0) -> ()"
    ),
    "random_start_": (
        "(Tensor(a!) adv, Tensor clean, Tensor eps, Tensor sample_ids, int seed, str norm, float lower=0.0, "
        "float upper=1.0) -> ()"
    ),
}


@pytest.mark.parametrize("name", _SCHEMAS)
def test_schemas_are_derived_from_the_one_signature(name: str) -> None:
    from cmai_fast.ops.schema import SCHEMAS

    assert SCHEMAS[name] == _SCHEMAS[name]


@pytest.mark.parametrize(
    "name", ["pgd_linf_step_", "pgd_l2_step_", "apgd_linf_step_", "apgd_l2_step_", "random_start_"]
)
def test_public_functions_have_the_one_signature(name: str) -> None:
    function, arguments = getattr(ops, name), STEPS[name]
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == arguments._fields
    assert {k: p.default for k, p in parameters.items() if p.default is not p.empty} == arguments._field_defaults
    alone = [k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert (alone[:1] == ["model_input"]) == ("model_input" in arguments._fields)
    assert function.__doc__ and function.__name__ == name
    with pytest.raises(TypeError, match="missing"):
        function()


def test_the_dispatcher_may_leave_out_defaults_and_take_names() -> None:
    row = torch.full((1,), 0.25)
    outcomes = []
    for named in ({}, {"lower": 0.0, "upper": 1.0}, {"decay": 1.0, "model_input": None}):
        adv = torch.full((1, 4), 0.5)
        torch.ops.cmai_fast.pgd_linf_step_(adv, torch.ones(1, 4), torch.full((1, 4), 0.5), row, row.clone(), **named)
        outcomes.append(adv)
    assert all(torch.equal(adv, torch.full((1, 4), 0.75)) for adv in outcomes)
