"""Starts runs of `one_of_several.py`, in one process or several."""

from __future__ import annotations

import gc
import json
import os
import selectors
import traceback
from pathlib import Path
from typing import Any

import one_of_several

PATIENCE = 300.0  # seconds


class Launcher:
    """A fork of this process, which has imported what a run needs, that forks for each run."""

    def __init__(self) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        gc.collect()
        gc.freeze()  # collections in the forks then do not look at what is imported here, and copy none of its memory
        self._process = os.fork()
        if not self._process:
            try:
                os.setsid()
                os.close(self._orders)  # so that the end of this process ends that one too
                os.close(self._answers)
                with open(orders) as read, open(answers, "w") as write:
                    one_of_several.serve(read, write)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(orders)
        os.close(answers)

    def run(self, folder: Path, name: str, settings: dict[str, Any], processes: int = 1, kill: str = "") -> list[int]:
        """The exit codes of its processes, negative for a signal. What they print is in `folder/name.log`."""
        order = {"folder": str(folder), "name": name, "settings": settings, "processes": processes, "kill": kill}
        os.write(self._orders, f"{json.dumps(order)}\n".encode())
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            assert selector.select(PATIENCE), f"{name} did not end in {PATIENCE:.0f} s:\n{said(folder, name)}"
        return json.loads(os.read(self._answers, 10_000))

    def close(self) -> None:
        os.killpg(self._process, 9)  # with runs that hang
        os.waitpid(self._process, 0)
        os.close(self._orders)
        os.close(self._answers)


def said(folder: Path, name: str) -> str:
    """The end of what a run printed."""
    log = folder / f"{name}.log"
    return log.read_text()[-3000:] if log.exists() else "it printed nothing"
