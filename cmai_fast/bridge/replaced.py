"""Lets modules do something else for a while, each instance by itself, and gives them back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module has this `forward`; on leaving, also by an exception, the one it had.

    A `forward` of the instance's own is somebody else's hook, such as accelerate's: it comes back.
    """
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
            if module in own:
                module.forward = own[module]
