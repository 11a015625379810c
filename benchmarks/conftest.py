"""Contenders are timed side by side: alternating, in one process, by medians. A table of ratios ends the run."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

Contender = Callable[[], Any]
ROUND_SECONDS = (
    2e-3  # calls shorter than this are repeated within a round, so that the clock and the caches do not decide
)


@pytest.fixture(scope="module")
def recipes() -> Any:
    """The recipes `at_size` and `sized_models`."""
    with recipes_on_path():
        import at_size
        import sized_models

        yield at_size, sized_models


@pytest.fixture(scope="module")
def peers() -> Any:
    """The recipe `peers`: other libraries' attacks, and classifiers that they take."""
    with recipes_on_path():
        import peers

        yield peers


@contextmanager
def recipes_on_path() -> Iterator[None]:
    folder = Path(__file__).parent / "recipes"
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for recipe in folder.glob("*.py"):
            sys.modules.pop(recipe.stem, None)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Parametrised indirectly by the benchmarks, "cpu" or "cuda"; the latter carries the marker `gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(contender: Contender, calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        contender()
    _wait(device)
    return (time.perf_counter() - start) / calls


@pytest.fixture
def side_by_side(benchmark: Any) -> Callable[..., dict[str, float]]:
    """Times contenders and files the result under a question; returns the median seconds of each."""

    def compare(
        question: str,
        contenders: Mapping[str, Contender],
        *,
        device: torch.device,
        limit: str | None = None,
        targets: Mapping[str, tuple[str, float]] | None = None,
        ceilings: Mapping[str, float] | None = None,
        figures: Mapping[str, tuple[float, str, float]] | None = None,
        rounds: int = 15,
    ) -> dict[str, float]:
        """The first contender is ours.

        limit: the contender that does no more than the hardware must; ours is reported as a share of its speed.
        targets: contender -> ("at least" | "at most", ratio of its time to ours | of our time to its).
        ceilings: contender -> the most seconds that it may take.
        figures: what -> (value, "at least" | "at most", target) of anything else that was measured.
        """
        calls = {}
        for name, contender in contenders.items():
            contender()  # warms up: compiles, allocates, fills caches
            calls[name] = max(1, round(ROUND_SECONDS / max(_seconds(contender, 1, device), 1e-7)))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                times[name].append(_seconds(contender, calls[name], device))
        medians = {name: statistics.median(t) for name, t in times.items()}
        ours = next(iter(contenders))
        checks = [(name, *_ratio(medians, ours, name, *target)) for name, target in (targets or {}).items()]
        checks += [(f"{n} us", medians[n] * 1e6, "at most", most * 1e6) for n, most in (ceilings or {}).items()]
        checks += [(name, *figure) for name, figure in (figures or {}).items()]
        benchmark.group = question
        benchmark.extra_info.update(
            question=question,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            threads=torch.get_num_threads(),
            seconds=medians,
            rounds=rounds,
            limit_share=medians[limit] / medians[ours] if limit else None,
            checks=checks,
        )
        benchmark.pedantic(contenders[ours], rounds=5)
        return medians

    return compare


def _ratio(medians: dict[str, float], ours: str, name: str, kind: str, target: float) -> tuple[float, str, float]:
    ratio = medians[name] / medians[ours]
    return (ratio if kind == "at least" else 1 / ratio), kind, target


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.1f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.2f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def _verdict(name: str, value: float, kind: str, target: float) -> str:
    met = value >= target if kind == "at least" else value <= target
    return f"{name} {value:.3g} ({kind} {target:g}: {'met' if met else 'MISSED'})"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [b.extra_info for b in session.benchmarks if "question" in b.extra_info] if session else []
    if not found:
        return
    write = terminalreporter.write_line
    terminalreporter.section("side by side: medians, ratio to ours in brackets")
    for info in found:
        (ours, own), *others = info["seconds"].items()
        write(f"{info['question']} ({info['device']}, {info['threads']} threads, {info['rounds']} rounds)")
        write(f"    {ours} {_time(own)};  " + ";  ".join(f"{n} {_time(t)} [{t / own:.2f}]" for n, t in others))
        said = [f"{info['limit_share']:.0%} of the limit"] if info["limit_share"] else []
        said += [_verdict(*check) for check in info["checks"]]
        if said:
            write("    " + ";  ".join(said))
