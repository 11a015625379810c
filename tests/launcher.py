"""Starts runs of `mbat/one_of_several.py`, in one process or several."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "mbat" / "one_of_several.py"
PATIENCE = 300.0  # seconds


class Launcher:
    """A process that has imported what a run needs, and forks for each run."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, folder: Path, name: str, settings: dict[str, Any], processes: int = 1, kill: str = "") -> list[int]:
        """The exit codes of its processes, negative for a signal. What they print is in `folder/name.log`."""
        order = {"folder": str(folder), "name": name, "settings": settings, "processes": processes, "kill": kill}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE), f"{name} did not end in {PATIENCE:.0f} s:\n{said(folder, name)}"
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)  # with runs that hang
        self._process.communicate()


def said(folder: Path, name: str) -> str:
    """The end of what a run printed."""
    log = folder / f"{name}.log"
    return log.read_text()[-3000:] if log.exists() else "it printed nothing"
