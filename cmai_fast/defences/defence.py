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
        name: as in `--defence`.
        label: its name in reports.
        values: the fields of `MBATConfig` that define it; others, such as eps, are set for each run.
    """

    name: str
    label: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))


DEFENCES: Registry[Defence] = Registry("defence", "cmai_fast.defences", other=frozenset({"defence"}))


def defence(name: str, label: str, **values: Any) -> Defence:
    """Registers a defence; a plugin calls this when it is imported.

    Raises:
        ValueError: the name is taken.
    """
    return DEFENCES.add(name, Defence(name, label, values))
