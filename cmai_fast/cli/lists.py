"""The output of `--list`: everything of one kind by name, including plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmai_fast.threat import SURFACES, Surface


def attacks() -> None:
    from cmai_fast.attacks import ATTACKS

    rows = [
        (name, a.label, ", ".join(a.threats), str(a.steps), ", ".join(f"{k}={v}" for k, v in a.settings.items()))
        for name, a in ATTACKS.items()
    ]
    _show("attack", ("", "norms", "steps", "settings (--set)"), rows)
    threats = [(name, *Surface(name).described()) for name in SURFACES]
    _show("threat", ("what is changed", "options (patch:size=0.2,x=1)", "eps"), threats)


def evaluation() -> None:
    """Tasks, data formats, metrics and suites."""
    from cmai_fast.data.formats import FORMATS
    from cmai_fast.evaluation.suites import SUITES
    from cmai_fast.metrics import METRICS
    from cmai_fast.tasks import TASKS

    _show("task", ("",), [(name, task.label) for name, task in TASKS.items()])
    _show("data", ("",), [(f"{name}:{f.takes}" if f.takes else name, _idea(f.read)) for name, f in FORMATS.items()])
    _show("metric", ("",), [(name, _idea(metric)) for name, metric in METRICS.items()])
    _show("suite", ("",), [(name, " ".join((found.__doc__ or "").split())) for name, found in SUITES.items()])


def defences() -> None:
    from cmai_fast.defences import DEFENCES

    values = [(name, d.label, ", ".join(f"{k}={v}" for k, v in d.values.items())) for name, d in DEFENCES.items()]
    _show("defence", ("", "settings"), values)


def policies() -> None:
    from cmai_fast.arm.policies import POLICIES

    rows = [
        (
            name,
            p.label,
            ", ".join(f"{k}={v!r}" if isinstance(v, (str, tuple)) else f"{k}={v}" for k, v in p.settings.items()),
        )
        for name, p in POLICIES.items()
    ]
    _show("policy", ("", "settings (--set policy.name=value)"), rows)


def _show(kind: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(kind, *columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)


def _idea(thing: Callable[..., object]) -> str:
    """The first docstring line of its file."""
    return (sys.modules[thing.__module__].__doc__ or "").strip().partition("\n")[0]
