"""Runs tests against several versions of PyTorch and `transformers`, one virtual environment each: `make matrix`.

Not part of CI: a first run downloads every version. Results go to .matrix/table.md, in the form that docs/versions.md
holds, and each run's output beside it. It ends with 1 if a run failed, but runs all first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".matrix"
# torch, transformers
CASES = (
    ("2.13.0", "5.21.1"),
    ("2.13.0", "5.22.2"),
    ("2.13.0", "5.23.0"),
    ("2.13.0", "5.24.0"),
)
# Bridges read the protocol of each family; the second set is what else touches transformers or PyTorch's internals.
SUITES = {
    "bridge": ("tests/bridge",),
    "quick": (
        "tests/test_versions.py",
        "tests/test_layout.py",
        "tests/attacks/test_pgd.py",
        "tests/data/test_collated_families.py",
        "tests/mbat/test_families.py",
        "tests/mbat/test_trainer.py",
        "tests/models/test_loading.py",
        "tests/ops/test_pgd_step.py",
        "tests/ops/test_info_nce.py",
    ),
}


def python_of(torch: str, transformers: str) -> Path:
    return FOLDER / f"torch-{torch}-transformers-{transformers}" / "bin" / "python"


def build_wheel() -> Path:
    """The package with its compiled extension, which links to no PyTorch: one serves all environments."""
    target = FOLDER / "wheel"
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", target, ROOT], check=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def set_up(torch: str, transformers: str, wheel: Path) -> None:
    python = python_of(torch, transformers)
    done = python.parent.parent / "done"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        subprocess.run([*install, f"torch=={torch}"], check=True)  # first, so that a local build of it is taken
        subprocess.run([*install, f"{wheel}[test]", f"torch=={torch}", f"transformers=={transformers}"], check=True)
        done.touch()
    subprocess.run([*install, "--force-reinstall", "--no-deps", wheel], check=True)


def run(torch: str, transformers: str, suite: str) -> tuple[str, list[str]]:
    """A cell of the table, and the names of tests that failed."""
    folder = python_of(torch, transformers).parent.parent
    report = folder / f"{suite}.xml"
    report.unlink(missing_ok=True)
    # The script and not `python -m pytest`: that would take the package beside the tests, not the installed one.
    command = [folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *SUITES[suite]]
    started = time.monotonic()
    with open(folder / f"{suite}.log", "w") as log:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    minutes = (time.monotonic() - started) / 60
    if code not in (0, 1) or not report.exists():
        return f"did not run (pytest ended with {code})", [f"{suite}.log"]
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - skipped - len(failed)
    parts = [
        f"{passed} passed",
        *([f"{len(failed)} failed"] if failed else []),
        *([f"{skipped} skipped"] * bool(skipped)),
    ]
    return f"{', '.join(parts)} ({minutes:.0f} min)", [f"{c.get('classname')}::{c.get('name')}" for c in failed]


def table(rows: list[tuple[str, ...]]) -> str:
    head = ("torch", "transformers", *SUITES)
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run the cases whose versions hold this text, such as 5.24", default="")
    parser.add_argument("--torch", help="another version of PyTorch for all cases, such as 2.15.0")
    parser.add_argument("--suite", action="append", choices=list(SUITES), help="default: all")
    arguments = parser.parse_args()
    cases = [(arguments.torch or torch, tf) for torch, tf in CASES if arguments.only in f"torch {torch} tf {tf}"]
    if not cases:
        parser.error(f"no case has {arguments.only!r}; there are {', '.join(f'{a} with {b}' for a, b in CASES)}")
    FOLDER.mkdir(exist_ok=True)
    wheel, rows, failed = build_wheel(), [], []
    for torch, transformers in cases:
        print(f"== torch {torch}, transformers {transformers}", flush=True)
        set_up(torch, transformers, wheel)
        cells = []
        for suite in arguments.suite or SUITES:
            cell, names = run(torch, transformers, suite)
            print(f"   {suite}: {cell}", *(f"      {name}" for name in names), sep="\n", flush=True)
            cells.append(cell)
            failed += names
        rows.append((torch, transformers, *cells, *["not run"] * (len(SUITES) - len(cells))))
    text = table(rows)
    (FOLDER / "table.md").write_text(text + "\n")
    print(text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
