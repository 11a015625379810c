"""The sections of the report with words, numbers and pictures: tables, the picture grid, checks, the protocol."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from html import escape
from typing import Any

from . import charts, findings
from .results import is_number

_DEFINITIONS = (
    ("Clean accuracy", "Share of samples answered right on untouched inputs."),
    ("Robust accuracy", "The same, each sample scored by the worst input that any attack of the suite found for it."),
    ("Attack success rate (ASR)", "Share of the samples right before the attack that are wrong after it."),
    (
        "After 8-bit rounding",
        "Robust accuracy after the attacked images are rounded to the 256 levels of a stored image.",
    ),
    ("eps", "Largest change of a pixel (L\N{INFINITY}) or of the whole image (L2), where pixels run from 0 to 1."),
    ("Model passes", "Forward and backward runs of the model that the attack took: its true price."),
    (
        "Robust accuracy with rejection",
        "Share of samples accepted and right when clean, and right or rejected under attack.",
    ),
    (
        "S<sub>c</sub>",
        "Cosine of the projected image and the projected text (question with answer): \N{MINUS SIGN}1 to 1.",
    ),
    ("AUROC", "Chance that an attacked input has a lower S<sub>c</sub> than an untouched one; 0.5 is guessing."),
    ("Intervals", "Bootstrap over samples; 95% unless the settings say otherwise."),
)


def absent(words: str) -> str:
    """The place of something that is not in the results."""
    return f'<p class="absent">{escape(words)}</p>'


def model_key(results: dict[str, Any], key: str) -> str:
    """A model's name with its line and marker, as charts draw it."""
    return f'<span class="key">{charts.swatch(key)}{escape(findings.model_name(results, key))}</span>'


def number_table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with row names on the left; `columns` are HTML, all else is escaped."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{_value(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    first = f'<th scope="col">{escape(corner)}</th>' if corner else "<td></td>"
    return f'<div class="scroll"><table><thead><tr>{first}{head}</tr></thead><tbody>{body}</tbody></table></div>'


def accuracy(results: dict[str, Any]) -> str:
    """Clean and robust accuracy and ASR of both models, then the same for every attack with what it cost."""
    models = findings.measured(results)
    rows = []
    for name, what, field, interval in (
        ("Clean accuracy", "untouched inputs", "acc_clean", "acc_clean_interval"),
        ("Robust accuracy", "worst input of all attacks", "acc_robust", "acc_robust_interval"),
        ("Robust accuracy, 8-bit", "attacked images rounded to 256 levels", "acc_robust_8bit", None),
        ("Attack success rate", "right before, wrong after", "asr", None),
    ):
        cells = [_share(model.get(field), model.get(interval) if interval else None) for _, model in models]
        change = ""
        if len(models) == 2:
            old, new = (model.get(field) for _, model in models)
            change = findings.points(new - old) if is_number(old) and is_number(new) else findings.NOT_MEASURED
            change = f"<td>{_value(change)}</td>"
        named = f'<th scope="row">{name}<small>{what}</small></th>'
        rows.append(f"<tr>{named}{''.join(f'<td>{cell}</td>' for cell in cells)}{change}</tr>")
    head = "".join(f'<th scope="col">{model_key(results, key)}</th>' for key, _ in models)
    if len(models) == 2:
        head += '<th scope="col">change</th>'
    counts = {f"{model['n']:,}" for _, model in models}
    samples = f"{' and '.join(sorted(counts))} samples{' each' if len(models) > len(counts) else ''}"
    small = " Small print under a value is its interval." if any(_has_interval(model) for _, model in models) else ""
    threat = escape(findings.threat_text(results["settings"]))
    return (
        f'<p class="about">Attacked at eps {threat}, {samples}.{small}</p>'
        f'<div class="stack"><div class="card scroll"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{_attacks(results)}</div>"
    )


def pictures(results: dict[str, Any]) -> str:
    """Cards of clean image, perturbation and adversarial image with the answers before and after."""
    cards: dict[str, list[str]] = {"undefended": [], "immunised": []}
    for picture in results.get("pictures") or []:
        cards["immunised" if picture.get("against") == "immunised" else "undefended"].append(_picture(results, picture))
    if not any(cards.values()):
        return absent("No pictures were kept in these results.")
    out = (
        '<p class="about">The change is amplified, around mid-grey. '
        "\N{CHECK MARK} right, \N{BALLOT X} wrong and underlined.</p>"
    )
    for key, drawn in cards.items():
        if drawn:
            name = findings.model_name(results, key)
            heading = f"The attack was made on {'the model' if name == 'this model' else f'the {name} model'}"
            out += f'<h3>{escape(heading)}</h3><div class="pictures">{"".join(drawn)}</div>'
    return out


def sanity(results: dict[str, Any]) -> str:
    """Every check with its verdict for each model."""
    models = findings.measured(results)
    checks: dict[str, dict[str, dict[str, Any]]] = {}
    for key, model in models:
        for check in model.get("sanity") or []:
            checks.setdefault(str(check.get("check")), {})[key] = check
    if not checks:
        return absent("No sanity checks were run with this evaluation, so take the numbers as unchecked.")
    failed = sum(check.get("passed") is False for by_model in checks.values() for check in by_model.values())
    run = sum(check.get("passed") is not None for by_model in checks.values() for check in by_model.values())
    verdict = f"{failed} of {run} failed." if failed else f"All {run} that were run passed."
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{_verdict(by_model.get(key))}</td>" for key, _ in models)
        + "</tr>"
        for name, by_model in checks.items()
    )
    head = "".join(f'<th scope="col">{model_key(results, key)}</th>' for key, _ in models)
    return (
        f'<p class="about">Signs of an attack too weak or a defence that only hides gradients. {verdict}</p>'
        f'<div class="card scroll"><table class="left"><thead><tr><th scope="col">check</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def protocol(results: dict[str, Any]) -> str:
    """Settings, versions, seed, samples and definitions: what is needed to do it again."""
    settings = dict(results["settings"])
    command = settings.pop("command", None)
    ids = results.get("sample_ids") or []
    samples = [("seed", results["seed"])]
    samples += [
        (f"samples, {findings.model_name(results, key)}", f"{m['n']:,}") for key, m in findings.measured(results)
    ]
    samples.append(("sample ids", f"{len(ids):,}, listed in results.json" if ids else "not recorded"))
    versions = results["versions"] if isinstance(results["versions"], dict) else {}
    shown = f"<pre>{escape(str(command))}</pre>" if command else ""
    definitions = "".join(f"<dt>{term}</dt><dd>{words}</dd>" for term, words in _DEFINITIONS)
    return (
        f'<p class="about">What was run, with what, on what.</p>{shown}<div class="pair">'
        f'<div class="card"><h3>Settings</h3>{_list(settings.items())}</div>'
        f'<div class="stack"><div class="card"><h3>Samples and seed</h3>{_list(samples)}</div>'
        f'<div class="card"><h3>Versions</h3>{_list(versions.items())}</div></div></div>'
        f'<div class="card last"><h3>Definitions</h3><dl class="definitions">{definitions}</dl></div>'
    )


def _attacks(results: dict[str, Any]) -> str:
    rows = ""
    columns = ("steps", "restarts", "robust accuracy", "ASR", "passes forward", "backward", "time")
    for key, model in findings.measured(results):
        attacks = model.get("attacks") or {}
        rows += (
            f'<tr class="part"><th colspan="{len(columns) + 1}" scope="rowgroup">{model_key(results, key)}</th></tr>'
        )
        if not attacks:
            rows += f'<tr><td colspan="{len(columns) + 1}">{_value("no attack recorded on its own")}</td></tr>'
        for name, attack in attacks.items():
            passes = attack.get("passes") or {}
            cells = [
                _count(attack.get("steps")),
                _count(attack.get("restarts")),
                findings.percent(attack.get("acc_robust")),
                findings.percent(attack.get("asr")),
                _count(passes.get("forward")),
                _count(passes.get("backward")),
                findings.duration(attack["seconds"]) if is_number(attack.get("seconds")) else findings.NOT_MEASURED,
            ]
            named = f'<th scope="row">{escape(findings.attack_text(name, attack, with_restarts=False))}</th>'
            rows += f"<tr>{named}{''.join(f'<td>{_value(cell)}</td>' for cell in cells)}</tr>"
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        '<div class="card scroll"><table><caption>Attack by attack</caption>'
        f'<thead><tr><th scope="col">attack</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _picture(results: dict[str, Any], picture: dict[str, Any]) -> str:
    amplified = picture.get("amplification")
    by = f"change \N{MULTIPLICATION SIGN}{amplified:g}" if is_number(amplified) else "change, amplified"
    strip = "".join(
        f"<figure>{_image(picture.get(field), caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for field, caption in (("clean_png", "clean"), ("perturbation_png", by), ("adversarial_png", "adversarial"))
    )
    truth = picture.get("answer")
    rows = "".join(
        f'<tr><th scope="row">{model_key(results, key)}</th>'
        + "".join(f"<td>{_answer((picture.get(key) or {}).get(kind), truth)}</td>" for kind in ("clean", "adversarial"))
        + "</tr>"
        for key, _ in findings.measured(results)
    )
    return (
        f'<article class="card picture"><h4>{escape(str(picture.get("question")))}</h4>'
        f'<p class="truth">right answer: {escape(str(truth))}</p><div class="strip">{strip}</div>'
        '<table class="left"><thead><tr><th scope="col">answer of</th><th scope="col">clean</th>'
        f'<th scope="col">adversarial</th></tr></thead><tbody>{rows}</tbody></table></article>'
    )


def _image(data: Any, caption: str) -> str:
    """A PNG given as base64 text; anything else is not put into the page."""
    try:
        png = base64.b64decode(data, validate=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError):
        png = b""
    if not png.startswith(b"\x89PNG"):
        return '<div class="noimage">no image<br>kept</div>'
    return f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _answer(answer: Any, truth: Any) -> str:
    if answer is None:
        return _value("not asked")
    right = str(answer).strip().casefold() == str(truth).strip().casefold()
    mark, word = ("\N{CHECK MARK}", "right") if right else ("\N{BALLOT X}", "wrong")
    shown = escape(str(answer)) if right else f"<u>{escape(str(answer))}</u>"
    return (
        f'<span class="mark {word}"><i aria-hidden="true">{mark}</i>{shown}<span class="unseen">, {word}</span></span>'
    )


def _verdict(check: dict[str, Any] | None) -> str:
    kind, words = "open", "not run"
    if check and check.get("passed") is not None:
        kind, words = ("passed", "\N{CHECK MARK} passed") if check["passed"] else ("failed", "\N{BALLOT X} failed")
    detail = f"<small>{escape(str(check['detail']))}</small>" if check and check.get("detail") else ""
    return f'<span class="status {kind}">{words}</span>{detail}'


def _share(value: Any, interval: Any) -> str:
    small = ""
    if is_number(value) and findings.is_interval(interval):
        small = f"<small>{100 * interval[0]:.1f} to {100 * interval[1]:.1f}%</small>"
    return _value(findings.percent(value)) + small


def _has_interval(model: dict[str, Any]) -> bool:
    return any(findings.is_interval(model.get(f"{field}_interval")) for field in ("acc_clean", "acc_robust"))


def _count(value: Any) -> str:
    return f"{value:,}" if is_number(value) else findings.NOT_MEASURED


def _value(text: str) -> str:
    """A cell's text, quieter where it is words for a missing number."""
    words = text[:3] in ("not", "no ")
    return f'<span class="absent-value">{escape(text)}</span>' if words else escape(text)


def _list(pairs: Any) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_setting(key, value))}</dd>" for key, value in pairs)
    return f"<dl>{items}</dl>" if items else absent("Not recorded.")


def _setting(key: str, value: Any) -> str:
    if value is None:
        return "not set"
    if key == "eps" and is_number(value):
        return f"{findings.eps_text(value)} = {value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
