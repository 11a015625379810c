"""Registries: things of one kind, found by name, one file each, in this package or in a plugin.

A built-in thing is a module of the kind's package, named by its file (`mi_fgsm.py` is `mi-fgsm`). A plugin is an entry
point of the group `cmai_fast.plugins` that names a module; importing the module registers what it adds. Names
of built-in things are listed and checked without importing them, so a misspelt name does not wait for PyTorch.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

GROUP = "cmai_fast.plugins"
T = TypeVar("T")


class Registry(Generic[T]):
    """The things of one kind, by name.

    Args:
        kind: the name of the kind in errors, such as "attack".
        package: the package whose modules are the built-in things, such as "cmai_fast.attacks".
        other: modules of that package that are not things of this kind.
    """

    def __init__(self, kind: str, package: str, other: frozenset[str] = frozenset()) -> None:
        self.kind, self.package = kind, package
        folder = Path(__file__).parents[1].joinpath(*package.split("."))
        modules = {file.stem for file in folder.glob("*.py")} - {"__init__"} - other
        self._modules = {name.replace("_", "-"): f"{package}.{name}" for name in modules}
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Registers `thing`. The decorators of each kind call it.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._things:
            raise ValueError(f"there are two {self.kind}s called {name!r}; rename one of them")
        self._things[name] = thing
        return thing

    def names(self) -> list[str]:
        """All names, sorted, including those of plugins."""
        load_plugins()
        return sorted({*self._modules, *self._things})

    def check(self, name: str) -> None:
        """Raises ValueError for an unknown name, with the nearest and all known names. Imports no built-in thing."""
        if name in self._modules or name in self._things or name in self.names():
            return
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(self.names())}")

    def __getitem__(self, name: str) -> T:
        self.check(name)
        if name not in self._things:
            import_module(self._modules[name])
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def items(self) -> list[tuple[str, T]]:
        """(name, thing) pairs, sorted by name; imports all of them."""
        return [(name, self[name]) for name in self.names()]


@lru_cache(maxsize=1)
def load_plugins() -> None:
    """Imports every plugin once. A plugin that fails to import gives a warning with its name and is left out."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # a plugin's own code may raise anything
            message = f"plugin {entry.name} ({entry.value}) cannot be loaded: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
