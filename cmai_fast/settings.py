"""Settings of a thing that is found by name: their types, and their values from Python or from text (`--set`)."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# None comes first: it is tried first on text, and text itself last.
_KINDS = (types.NoneType, bool, int, float, tuple, str)


def kinds_of(annotation: Any, names: Mapping[str, Any], owner: str) -> tuple[type, ...]:
    """The types of an annotation such as `float | None` or `tuple[str, ...]`, in the order in which they are tried.

    Args:
        names: where an annotation that is text finds its names.
        owner: whose setting it is, for the error.

    Raises:
        TypeError: another type than bool, int, float, str, tuple or None.
    """
    if isinstance(annotation, str):
        annotation = eval(annotation, dict(names))  # only this one: others may name types not imported
    united = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(k) or k for k in (typing.get_args(annotation) if united else (annotation,))]
    if bad := [k for k in kinds if k not in _KINDS]:
        raise TypeError(f"a setting of {owner} is a bool, int, float, str or None, or a tuple of names, not {bad[0]!r}")
    return tuple(k for k in _KINDS if k in kinds)


def described(kinds: Sequence[type], default: Any) -> str:
    """The types and the default, as text: `none or float, default 0.5`."""
    names = {types.NoneType: "none", tuple: "names with commas"}
    return f"{' or '.join(names.get(kind, kind.__name__) for kind in kinds)}, default {default}"


def typed(value: Any, kinds: Sequence[type]) -> Any:
    """`value` as the first of these types that takes it, also from text as a user writes it (`8/255`).

    Raises:
        ValueError: none takes it.
    """
    for kind in kinds:
        try:
            return _read(value, kind)
        except (ValueError, ZeroDivisionError, OverflowError):
            continue
    raise ValueError(value)


def _read(value: Any, kind: type) -> Any:
    if isinstance(value, str):
        text = value.strip()
        if kind is str:
            return value
        if kind is tuple:
            return tuple(part for part in map(str.strip, text.split(",")) if part)
        if kind is types.NoneType and text.lower() == "none":
            return None
        if kind is bool and text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(Fraction(text)) if "/" in text else float(text)
    elif kind is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(value)
