"""The tests of the operators once more, by Triton's kernels in its interpreter: in a process of its own for each file,
since Triton decides at its import between the interpreter and the compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "name", ["test_pgd_step", "test_apgd_step", "test_random_start", "test_cosine_heads", "test_info_nce"]
)
def test_kernels_in_the_interpreter(name: str, request: pytest.FixtureRequest) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CMAI_FAST_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(HERE / f"{name}.py")],
        env=environment, cwd=request.config.rootpath, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"{name}.py in the interpreter:\n{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}", pytrace=False)
    # Nothing is left out silently: a good return code also covers tests that were skipped.
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\b\d+ passed", last) and not re.search("skipped|xfailed|failed|error", last), done.stdout
