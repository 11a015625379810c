"""All that needs an NVIDIA GPU, in one command: the tests, the memory checkers, the benchmarks, models at size.

    python benchmarks/recipes/on_gpu.py --out benchmarks/results/h200

Writes gpu.json (commit, versions, device, each command with its exit code, time and last lines, the benchmarks'
medians and ratios, and targets with what was measured) and one log a command. A command that fails is recorded, and the
others still run; the exit code is then 1. `--only` chooses some of them; what gpu.json holds of the others stays, if
it is of the same commit and device. Run it in the root of the repository. Models at size need bitsandbytes and 40 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cmai_fast.evaluation.results import write_results
from cmai_fast.evaluation.versions import versions

PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
TOGETHER = ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
# The checkers slow a kernel down a hundredfold; the CUDA backend's own tests are what they are for.
CHECKED = ["tests/ops", "-k", "cuda"]


_AT_SIZE = [sys.executable, "benchmarks/recipes/at_size.py", "--rounds", "3"]
_LLAVA_7B = [*_AT_SIZE, "--model", "llava-7b", "--bits", "4"]
# What is measured at size: command, and of its numbers (kind, step) what is asked for at most.
AT_SIZE: dict[str, tuple[list[str], dict[tuple[str, str], float]]] = {
    "llava-7b": ([*_LLAVA_7B, "--batch", "8"], {("over_clean", "mbat-bridge-r0"): 2.5, ("over_clean", "cmai"): 1.6}),
    "llava-7b-batch-4": (
        [*_LLAVA_7B, "--batch", "4", "--recompute", "full", "--only", "clean", "mbat-bridge-r0", "cmai"],
        {("peak_bytes", "mbat-bridge-r0"): 16e9, ("over_clean", "cmai"): 1.6, ("peak_bytes", "cmai"): 16e9},
    ),
    "llava-7b-batch-1": (
        [*_LLAVA_7B, "--batch", "1", "--recompute", "full", "--only", "clean", "mbat-bridge-r0"],
        {("peak_bytes", "mbat-bridge-r0"): 12e9},
    ),
    "qwen2.5-vl-7b": ([*_AT_SIZE, "--model", "qwen2.5-vl-7b", "--bits", "4", "--batch", "4"], {}),
    "clip-l-336": ([*_AT_SIZE, "--model", "clip-l-336", "--batch", "32"], {}),
}


def commands(out: Path) -> dict[str, list[str]]:
    def sanitizer(tool: str) -> list[str]:
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST, *CHECKED]

    return {
        "tests": [*PYTEST, *TOGETHER, "tests"],
        "memcheck": sanitizer("memcheck"),
        "racecheck": sanitizer("racecheck"),
        "benchmarks": [*PYTEST, "benchmarks", "--benchmark-only", f"--benchmark-json={out / 'benchmarks.json'}"],
        **{name: [*command, "--out", str(out / f"{name}.json")] for name, (command, _) in AT_SIZE.items()},
    }


def targets(name: str, out: Path) -> list[dict[str, Any]]:
    """What was asked of a model at size, beside what its run measured; empty where it did not finish."""
    if not (out / f"{name}.json").exists():
        return []
    found = json.loads((out / f"{name}.json").read_text())
    return [
        {"what": f"{kind} of {step}", "measured": found[kind][step], "at_most": most, "met": found[kind][step] <= most}
        for (kind, step), most in AT_SIZE[name][1].items()
    ]


def run(name: str, command: list[str], out: Path) -> dict[str, Any]:
    print(f"== {name}: {' '.join(command)}", flush=True)
    record: dict[str, Any] = {
        "command": " ".join(["python", *command[1:]] if command[0] == sys.executable else command)
    }
    if shutil.which(command[0]) is None:
        return record | {"exit_code": None, "tail": [f"{command[0]} is not installed"]}
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    (out / f"{name}.log").write_text(done.stdout)
    tail = done.stdout.splitlines()[-8:]  # without the warnings above: the log has them
    print("\n".join(tail), flush=True)
    return record | {"exit_code": done.returncode, "seconds": time.perf_counter() - start, "tail": tail}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and the logs")
    parser.add_argument("--only", nargs="*", choices=sorted(commands(Path())))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device or driver here; this measures one")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "runs": {},
    }
    if (args.out / "gpu.json").exists():
        earlier = json.loads((args.out / "gpu.json").read_text())
        if all(earlier[key] == record[key] for key in ("device", "versions")):
            record = earlier
    for name, command in commands(args.out).items():
        if args.only is None or name in args.only:
            (args.out / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
            record["runs"][name] = run(name, command, args.out)
            if name in AT_SIZE:
                record["runs"][name]["targets"] = targets(name, args.out)
            write_results(record, args.out / "gpu.json")  # after each: the time on a GPU may end
    measured = args.out / "benchmarks.json"
    if measured.exists():
        record["benchmarks"] = [b["extra_info"] for b in json.loads(measured.read_text())["benchmarks"]]
        measured.unlink()
        write_results(record, args.out / "gpu.json")
    return int(any(r["exit_code"] != 0 for r in record["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
