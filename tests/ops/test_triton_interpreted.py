"""The tests of the operators once more, by Triton's kernels in its interpreter: in processes of their own, since Triton
decides at its import between the interpreter and the compiler.

The interpreter takes its time for every operation of every program, so these are fewer cases than elsewhere: each shape
and each branch of a kernel, but not all their combinations. Where one is left out, the test says so by `INTERPRETED` or
by the marker `not_interpreted`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


# Two processes, of about the same length: one for all would leave a core idle, and each imports PyTorch and Triton.
@pytest.mark.parametrize(
    "names",
    [("pgd_step", "apgd_step", "random_start"), ("cosine_heads", "info_nce", "gated_activation")],
    ids="steps losses".split(),
)
def test_kernels_in_the_interpreter(names: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CMAI_FAST_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.pop("PYTEST_ADDOPTS", None)
    files = [str(HERE / f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *files],
        env=environment, cwd=request.config.rootpath, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"in the interpreter:\n{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}", pytrace=False)
    # Nothing is left out silently: a good return code also covers tests that were skipped.
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\b\d+ passed", last) and not re.search("skipped|xfailed|failed|error", last), done.stdout
    for name in names:
        assert re.search(rf"test_{name}\.py::.* PASSED", done.stdout), f"test_{name}.py ran no test"
