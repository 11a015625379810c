"""What nvcc made of the CUDA kernels, read from the extension that is installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmai_fast.ops import cpu, cuda

# A thread block of 256 shall find three others beside it on a multiprocessor of 65536 registers; one of the kernels for
# what is not aligned, two others.
REGISTERS = {"wide": 64, "other": 80}
ACCESS = {"AccessILi4ELb1E": "wide", "AccessILi1ELb0E": "narrow", "AccessILi4ELb0E": "spread",
          "AccessILi8ELb1E": "halves"}  # fmt: skip
ELEMENTWISE = ["pgd_linf_step", "pgd_l2_step", "apgd_linf_step", "apgd_l2_mix", "apgd_l2_project", "random_linf_start",
               "random_l2_start", "gated_forward", "gated_backward"]  # fmt: skip
# How many tensors of halves each reads and writes, and instructions for an element at most, as those of Triton's
# kernels (test_triton_activation_compiled.py).
OF_HALVES = {"gated_forward": (2, 1, 30), "gated_backward": (3, 2, 40)}


def cuobjdump(option: str) -> str:
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin or "").parent / "backends/nvidia/bin/cuobjdump" if triton else None
    program = str(beside) if beside and beside.exists() else shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("cuobjdump is neither in the package triton nor in /usr/local/cuda/bin")
    return subprocess.run([program, option, cpu._C.__file__], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def architectures() -> list[str]:
    if cpu._C is None or not hasattr(cpu._C, "cuda_no_device"):
        pytest.skip(f"no CUDA kernels here: {cuda.unavailable()}")
    return [f"sm_{arch}" for arch in cpu._C.BUILD["cuda architectures"].split(";")]


def by_function(text: str) -> Iterator[tuple[tuple[str, str], str]]:
    """((architecture, mangled name), what is said of it)."""
    for section in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        arch = section.split(maxsplit=1)[0]
        for entry in re.split(r"^\s*Function\s*:?\s*", section, flags=re.MULTILINE)[1:]:
            name, said = entry.split("\n", 1)
            yield (arch, name.rstrip(":")), said


@pytest.fixture(scope="module")
def usage(architectures: list[str]) -> dict[tuple[str, str], dict[str, int]]:
    said = by_function(cuobjdump("-res-usage"))
    return {key: {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)} for key, text in said}


@pytest.fixture(scope="module")
def code(architectures: list[str]) -> dict[tuple[str, str], str]:
    return dict(by_function(cuobjdump("-sass")))


def access_of(name: str) -> str | None:
    return next((access for mangled, access in ACCESS.items() if mangled in name), None)


def test_every_kernel_is_there_for_every_architecture(
    architectures: list[str], usage: dict[tuple[str, str], dict[str, int]]
) -> None:
    kernels = {arch: {name for built, name in usage if built == arch} for arch in architectures}
    assert set(kernels) == {arch for arch, _ in usage}
    assert all(names == kernels[architectures[0]] for names in kernels.values())
    accesses = [access_of(name) for name in kernels[architectures[0]]]
    assert accesses.count("wide") == accesses.count("narrow") + accesses.count("spread") >= 13
    assert accesses.count("halves") == len(OF_HALVES)


def test_nothing_spills_and_registers_keep_their_budget(usage: dict[tuple[str, str], dict[str, int]]) -> None:
    for (arch, name), used in usage.items():
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} on {arch} has {used}"
        budget = REGISTERS["wide" if access_of(name) in ("wide", "halves") else "other"]
        assert used["REG"] <= budget, f"{name} on {arch} takes {used['REG']} registers of {budget}"


def test_no_local_memory(code: dict[tuple[str, str], str]) -> None:
    assert code
    for (arch, name), text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} on {arch}"


def versions(code: dict[tuple[str, str], str], kernel: str, access: str) -> dict[tuple[str, str], str]:
    file, name = kernel.split("_", 1)
    pattern = re.compile(rf"_cuda_{file}_\w+?_cu_[0-9a-f]+?\d{{1,2}}{name}I")
    return {key: text for key, text in code.items() if access_of(key[1]) == access and pattern.search(key[1])}


@pytest.mark.parametrize("kernel", ELEMENTWISE)
def test_aligned_images_move_128_bits_at_once(
    kernel: str, architectures: list[str], code: dict[tuple[str, str], str]
) -> None:
    found = versions(code, kernel, "wide")
    assert {arch for arch, _ in found} == set(architectures)
    for (arch, mangled), text in found.items():
        # Two groups of four floats a thread: of the image, and for a float32 gradient or original as many again.
        assert len(re.findall(r"LDG\.E\.128", text)) >= 2, f"{mangled} on {arch}"
        assert len(re.findall(r"STG\.E\.128", text)) >= 2, f"{mangled} on {arch}"
        # The other stores are of four halves.
        assert set(re.findall(r"STG\.E(?:\.\w+)?", text)) <= {"STG.E.128", "STG.E.64"}, f"{mangled} on {arch}"


@pytest.mark.parametrize("kernel", OF_HALVES)
def test_aligned_halves_move_128_bits_at_once(
    kernel: str, architectures: list[str], code: dict[tuple[str, str], str]
) -> None:
    found, (reads, writes, instructions) = versions(code, kernel, "halves"), OF_HALVES[kernel]
    assert {arch for arch, _ in found} == set(architectures)
    for (arch, mangled), text in found.items():
        # One for a thread's eight elements of a tensor, in the code for bfloat16 and in that for float16.
        for access, count in (("LDG", 2 * reads), ("STG", 2 * writes)):
            assert len(re.findall(rf"{access}\.E", text)) == count, f"{mangled} on {arch}"
            assert len(re.findall(rf"{access}\.E\.128", text)) == count, f"{mangled} on {arch}"
        assert len(re.findall("MUFU.EX2", text)) == 2 * 8, f"{mangled} on {arch}"
        assert len(re.findall("BRA", text)) <= 8, f"{mangled} on {arch} has a branch per element"
        count = len(re.findall(r"/\*[0-9a-f]{4}\*/\s+\S", text))
        assert count <= 2 * 8 * instructions, f"{mangled} on {arch}: {count} instructions"


def test_the_last_architecture_comes_as_ptx_too(architectures: list[str]) -> None:
    listed = set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("-lptx")))
    assert listed == {architectures[-1]}
