"""`results.json` as one HTML file that needs nothing else, neither network nor library.

Sections stand in a fixed order. One with nothing to show is left out, of the page and of its navigation.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cmai_fast.evaluation.results import Results, upgrade_results
from cmai_fast.files import plain, write_text

from . import charts, findings, panels, tables
from .models import Shown, shown

# (anchor and template, heading, name in the navigation, what gives the template its values)
_SECTIONS = (
    ("accuracy", "Accuracy, clean and attacked", "Accuracy", tables.accuracy),
    ("eps", "Robust accuracy over the strength of the attack", "Over eps", panels.robustness_curve),
    ("consistency", "Cross-modal consistency S_c", "Consistency", panels.consistency),
    ("detector", "Detecting attacked inputs", "Detector", panels.detector),
    ("training", "Training", "Training", panels.training),
    ("overhead", "Overhead", "Overhead", panels.overhead),
    ("pictures", "What the attack looks like", "Pictures", tables.pictures),
    ("sanity", "Sanity checks", "Sanity checks", tables.sanity),
    ("protocol", "Protocol", "Protocol", tables.protocol),
)


def write_report(results: Any, path: Path) -> Path:
    """Writes the report on `results` (of any schema that `read_results` reads) to `path`, atomically; returns `path`.

    The file carries its styles, charts and pictures inside, asks the network for nothing, follows the reader's light or
    dark mode, and prints.

    Raises:
        ValueError: naming the keys that a report cannot do without and that are missing.
        OSError: naming the path and why it cannot be written; what stood there before is unchanged.
    """
    return write_text(render_report(results), Path(path))


def render_report(results: Any) -> str:
    """The page that `write_report` writes, as text."""
    # Plain, so that it makes no difference whether they come from memory or from the file.
    checked = upgrade_results(plain(results))
    models = shown(checked)
    sections = []
    for anchor, heading, name, values_of in _SECTIONS:
        values = values_of(checked, models)
        if values is not None:
            sections.append({"anchor": anchor, "heading": heading, "name": name, "values": values})
    page = _environment().get_template("page.html.j2").render(
        headline=findings.finding(checked),
        lead=findings.consequence(checked),
        subject=_subject(checked, models),
        caveats=findings.caveats(checked),
        models=models,
        tiles=tables.tiles(models) if len(models) < 3 else [],
        leaderboard=tables.leaderboard(models) if len(models) > 2 else [],
        sections=sections,
    )  # fmt: skip
    # Texts from JSON may hold half a surrogate pair, which no file in UTF-8 can.
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cmai_fast.report"),
        autoescape=True,
        undefined=StrictUndefined,  # a name misspelt in a template is an error, not a gap in the page
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"unbroken": _unbroken, "subscripted": _subscripted}
    environment.globals |= {"swatch": charts.swatch}
    environment.tests["model"] = lambda value: isinstance(value, Shown)
    return environment


def _subject(results: Results, models: list[Shown]) -> list[str]:
    """What was measured, on what, by which version."""
    settings, versions = results["settings"], results["versions"]
    split = f", {settings['split']} split" if settings.get("split") else ""
    counts = sorted({model.record["n"] for model in models})
    samples = " and ".join(f"{n:,}" for n in counts) if len(counts) < 3 else f"{counts[0]:,} to {counts[-1]:,}"
    version = versions.get("cmai_fast") if isinstance(versions, dict) else None
    what = settings.get("model") if len(models) < 3 else f"{len(models)} models"
    return [
        "Robustness report",
        f"{what or models[0].name} on {settings['data']}{split}",
        f"{samples} samples",
        f"cmai_fast {version}" if version else "cmai_fast",
    ]


def _unbroken(text: str) -> Markup:
    """Names with hyphens ("PGD-50") kept on one line; long ones may break, or they would leave a narrow page."""
    return Markup(re.sub(r"(?<![\w-])\w+(?:-\w+)+", _whole, str(escape(text))))


def _whole(match: re.Match[str]) -> str:
    return f'<span class="whole">{match[0]}</span>' if len(match[0]) <= 20 else match[0]


def _subscripted(text: str) -> Markup:
    return Markup(str(escape(text)).replace("S_c", "S<sub>c</sub>"))
