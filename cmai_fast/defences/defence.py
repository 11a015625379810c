"""A defence: values of `MBATConfig`, under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cmai_fast.registry import Registry


@dataclass(frozen=True)
class Defence:
    """A way to train, as `MBATConfig(**defence.values, ...)` does it.

    Attributes:
        name: what it is asked for by.
        label: what reports call it.
        values: fields of `MBATConfig` that make it what it is; the others, such as eps, are whoever trains.
    """

    name: str
    label: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))


DEFENCES: Registry[Defence] = Registry("defence", "cmai_fast.defences", other=frozenset({"defence"}))


def defence(name: str, label: str, **values: Any) -> Defence:
    """Registers a defence; a plugin calls it where it is imported.

    Raises:
        ValueError: the name is taken.
    """
    return DEFENCES.add(name, Defence(name, label, values))
