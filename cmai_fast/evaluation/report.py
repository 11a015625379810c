"""The report: `results.json` as one HTML file that needs nothing else, neither network nor library.

Sections stand in a fixed order; one whose numbers are missing says so in words, and never shows an empty chart.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from cmai_fast.files import plain, write_text

from . import findings, panels, tables
from .results import check_results, is_number
from .style import SCRIPT, STYLE

# (anchor, heading, name in the navigation, what draws it)
_SECTIONS = (
    ("accuracy", "Accuracy, clean and attacked", "Accuracy", tables.accuracy),
    ("eps", "Robust accuracy over the strength of the attack", "Over eps", panels.robustness_curve),
    ("consistency", "Cross-modal consistency S<sub>c</sub>", "Consistency", panels.consistency),
    ("detector", "Detecting attacked inputs", "Detector", panels.detector),
    ("training", "Training", "Training", panels.training),
    ("overhead", "Overhead", "Overhead", panels.overhead),
    ("pictures", "What the attack looks like", "Pictures", tables.pictures),
    ("sanity", "Sanity checks", "Sanity checks", tables.sanity),
    ("protocol", "Protocol", "Protocol", tables.protocol),
)


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Writes the report on `results` (as `results.read_results` gives them) to `path`, atomically; returns `path`.

    The file carries its styles, charts and pictures inside, asks the network for nothing, follows the reader's light or
    dark mode, and prints.

    Raises:
        ValueError: naming the keys that a report cannot do without and that are missing.
        OSError: naming the path and why it cannot be written; what stood there before is unchanged.
    """
    return write_text(render_report(results), Path(path))


def render_report(results: dict[str, Any]) -> str:
    """The page that `write_report` writes, as text."""
    results = plain(results)  # so that it makes no difference whether they come from memory or from the file
    check_results(results)
    headline = findings.finding(results)
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, _, name, _ in _SECTIONS)
    sections = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{draw(results)}</section>' for anchor, heading, _, draw in _SECTIONS
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(headline)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<header><p class="eyebrow">{escape(_subject(results))}</p><h1>{_unbroken(escape(headline))}</h1>'
        f'<p class="lead">{escape(findings.consequence(results))}</p>{_caveats(results)}{_tiles(results)}'
        f"<nav aria-label='Sections'>{links}</nav></header>\n{sections}\n</main>"
        f'<div id="tip" role="presentation"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _subject(results: dict[str, Any]) -> str:
    """One line: what was measured, on what, by which version."""
    settings = results["settings"]
    split = f", {settings['split']} split" if settings.get("split") else ""
    samples = " and ".join(sorted({f"{model['n']:,}" for _, model in findings.measured(results)}))
    version = results["versions"].get("cmai_fast") if isinstance(results["versions"], dict) else None
    made = f"cmai_fast {version}" if version else "cmai_fast"
    dot = " \N{MIDDLE DOT} "
    return f"Robustness report{dot}{settings['model']} on {settings['data']}{split}{dot}{samples} samples{dot}{made}"


def _unbroken(html: str) -> str:
    """Names with hyphens ("PGD-50") kept on one line."""
    return re.sub(r"\w+(?:-\w+)+", r'<span class="whole">\g<0></span>', html)


def _caveats(results: dict[str, Any]) -> str:
    said = findings.caveats(results)
    if not said:
        return ""
    items = "".join(f"<li>{escape(caveat)}</li>" for caveat in said)
    return f'<div class="caveats" role="note"><p>Before you trust the headline</p><ul>{items}</ul></div>'


def _tiles(results: dict[str, Any]) -> str:
    """The few numbers that most readers came for, one tile each with a row per model."""
    models = findings.measured(results)

    def shares(title: str, note: str, values: list[Any]) -> str:
        rows = "".join(
            _tile_row(results, key, findings.percent(value), value)
            for (key, _), value in zip(models, values, strict=True)
        )
        return f'<div class="card tile"><h3>{title}</h3>{rows}<p class="note">{note}</p></div>'

    tiles = [
        shares(
            "Attack success (ASR)", "right answers turned wrong; lower is better", [m.get("asr") for _, m in models]
        ),
        shares("Robust accuracy", "right under the worst attack", [m["acc_robust"] for _, m in models]),
        shares("Clean accuracy", "right without an attack", [m["acc_clean"] for _, m in models]),
    ]
    if any(model.get("detection") for _, model in models):
        rows = ""
        for key, model in models:
            value = (model.get("detection") or {}).get("auroc")
            rows += _tile_row(results, key, findings.decimal(value), value)
        note = "0.5 is chance, 1 finds every attack"
        tiles.append(f'<div class="card tile"><h3>Detector AUROC</h3>{rows}<p class="note">{note}</p></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile_row(results: dict[str, Any], key: str, text: str, share: Any) -> str:
    words = "" if is_number(share) else ' class="words"'
    meter = f'<div class="meter {key}"><i style="width:{100 * share:.1f}%"></i></div>' if is_number(share) else ""
    return f'<div class="row">{tables.model_key(results, key)}<b{words}>{text}</b></div>{meter}'
