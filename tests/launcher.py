"""Starts runs of `one_of_several.py`, in one process or several, and compares what they trained."""

from __future__ import annotations

import gc
import json
import os
import selectors
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import one_of_several

PATIENCE = 300.0  # seconds
Weights = dict[str, torch.Tensor]
Trained = tuple[Weights, dict[str, Any]]
Train = Callable[..., Trained]


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


def trains(launcher: Launcher, folder: Path, defaults: dict[str, Any]) -> Train:
    """A function that trains the model in `folder`, on 8 samples a step over all processes."""

    def train(name: str, processes: int, **changes: Any) -> Trained:
        """Weights and what the run said of itself; a run of this name is made once."""
        settings = defaults | {"per_device_train_batch_size": 8 // processes} | changes
        if not (folder / f"{name}.safetensors").exists():
            codes = launcher.run(folder, name, settings, processes)
            assert codes == [0] * processes, f"{codes}:\n{said(folder, name)}"
        return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())

    return train


def assert_same(one: Weights, two: Weights, atol: float = 1e-9) -> None:  # in float64
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
