"""The sections of the report with charts. Each takes the results and gives HTML, or says in words what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from . import charts, findings
from .results import is_number
from .tables import absent, model_key, number_table

_LOWEST_FPR = (
    1e-3  # left end of the logarithmic axis: with 500 to 10,000 clean samples less than this is hardly measured
)
_DRAWN_POINTS = 120  # a longer training log is drawn as means over bins with their range


def robustness_curve(results: dict[str, Any]) -> str:
    """Robust accuracy of both models over eps, as a chart and as the table behind it."""
    settings = results["settings"]
    unit, scale = _eps_unit(settings)
    lines, columns, everywhere = [], [], set()
    for key, model in findings.measured(results):
        points = {
            findings.eps_number(point["eps"]): point["acc_robust"]
            for point in model.get("curve") or []
            if point.get("eps") is not None and is_number(point.get("acc_robust"))
        }
        if not points:
            continue
        points.setdefault(0.0, model["acc_clean"])  # nothing may be changed at eps 0
        name = findings.model_name(results, key)
        ordered = sorted(points.items())
        tips = [f"{name}, eps {_eps_label(eps, scale)}: {findings.percent(share)}" for eps, share in ordered]
        lines.append(charts.Line(name, key, [(scale * eps, share) for eps, share in ordered], tips, markers=True))
        columns.append((key, points))
        everywhere |= set(points)
    if not lines:
        return absent("No attack was run at more than one eps, so there is no curve to draw.")
    marks = sorted({scale * eps for eps in everywhere})
    top = marks[-1] * 1.02
    x = charts.Axis(f"eps ({unit})", 0.0, top, tuple((mark, f"{mark:.4g}") for mark in _uncrowded(marks, top)))
    headline = scale * findings.eps_number(settings["eps"])
    rules = [(headline, "headline eps")] if 0 < headline <= top else []
    ends = ", ".join(f"{line.name} {findings.percent(line.points[-1][1])}" for line in lines)
    chart = charts.line_chart(
        lines,
        x,
        charts.percent_axis("robust accuracy"),
        f"Line chart of robust accuracy over eps in {unit}. At eps {marks[-1]:.4g}: {ends}.",
        rules=rules,
    )
    rows = [
        (_eps_label(eps, scale), [findings.percent(points.get(eps)) for _, points in columns])
        for eps in sorted(everywhere)
    ]
    table = number_table(f"eps ({unit})", [model_key(results, key) for key, _ in columns], rows)
    attack = settings.get("curve_attack")
    note = "The value at eps 0 is clean accuracy." + (
        f" Attack of this curve: {escape(str(attack))}." if attack else ""
    )
    return _about(note) + _pair(_figure(chart), table)


def consistency(results: dict[str, Any]) -> str:
    """Histograms of S_c, one panel a model, on common axes so that the panels can be compared."""
    found = []
    for key, model in findings.measured(results):
        shapes = []
        for kind in ("clean", "adversarial"):
            histogram = ((model.get("s_c") or {}).get(kind) or {}).get("histogram") or {}
            edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
            total = sum(counts)
            if total > 0 and len(edges) == len(counts) + 1:
                role = "clean" if kind == "clean" else key
                shapes.append(charts.Steps(kind, role, edges, [count / total for count in counts]))
        if shapes:
            found.append((key, model, shapes))
    if not found:
        return absent(
            "The model has no consistency heads or S_c was not recorded, so there is no distribution to show."
        )
    steps = [shape for _, _, shapes in found for shape in shapes]
    filled = [edge for shape in steps for edge in _filled(shape)]
    x = charts.number_axis("S_c, the cosine of image and text projections (no unit)", filled, ticks=6)
    y = charts.percent_axis("share of samples per bin", max(max(shape.heights) for shape in steps))
    cards = []
    for key, model, shapes in found:
        name = findings.model_name(results, key)
        tau = (model.get("detection") or {}).get("threshold")
        rule = (tau, "threshold: reject below") if is_number(tau) and x.low <= tau <= x.high else None
        means = [(kind, ((model["s_c"].get(kind) or {}).get("mean"))) for kind in ("clean", "adversarial")]
        said = ", ".join(f"{kind} mean {findings.decimal(mean, 2)}" for kind, mean in means if is_number(mean))
        chart = charts.histogram_chart(shapes, x, y, f"Histogram of S_c for {name}: {said}.", rule=rule)
        entries = [(shape.role, f"{shape.name} inputs") for shape in shapes]
        cards.append(f'<h3>{escape(name)}</h3>{_figure(chart, entries, "area")}<p class="note">{said}</p>')
    missing = _missing(results, [key for key, *_ in found], "S_c")
    about = "How well image and text (question with answer) fit, untouched and attacked. A gap can serve for detection."
    return _about(about) + _pair(*cards) + missing


def detector(results: dict[str, Any]) -> str:
    """ROC of the detector that rejects low S_c, and its working points."""
    detected = [(key, model) for key, model in findings.measured(results) if model.get("detection")]
    if not detected:
        return absent("No detector was evaluated: the models have no calibrated consistency heads.")
    lines, entries = [], []
    for key, model in detected:
        roc = model["detection"].get("roc") or {}
        corners = _corners(roc.get("fpr") or [], roc.get("tpr") or [])
        if corners:
            name = findings.model_name(results, key)
            lines.append(charts.Line(name, key, corners))
            entries.append((key, f"{name}, AUROC {findings.decimal(model['detection'].get('auroc'))}"))
    figure = absent("The ROC curve was not recorded.")
    if lines:
        entries.append(("chance", "chance, AUROC 0.5"))
        chance = [(_LOWEST_FPR ** (1 - i / 40),) * 2 for i in range(41)]
        ticks = ((1e-3, "0.1%"), (1e-2, "1%"), (1e-1, "10%"), (1.0, "100%"))
        chart = charts.line_chart(
            [charts.Line("chance", "chance", chance), *lines],
            charts.Axis("false positive rate: clean inputs rejected (log scale)", _LOWEST_FPR, 1.0, ticks, log=True),
            charts.percent_axis("true positive rate: attacked inputs rejected"),
            "ROC curve of the detector. " + "; ".join(text for _, text in entries) + ".",
            rules=[(0.01, "1%"), (0.05, "5%")],
            label_ends=False,
            height=340,
        )
        figure = _figure(chart, entries, "line")
    table = number_table(
        "", [model_key(results, key) for key, _ in detected], _detector_rows(detected, results["settings"])
    )
    about = (
        "An input is rejected when its S_c is under a threshold fixed on clean data outside the test split. "
        "Rejection can honestly buy about the accuracy at half of eps; more would mean that the attack is too weak."
    )
    missing = _missing(results, [key for key, _ in detected], "the detector")
    return _about(about) + _pair(figure, table) + missing


def training(results: dict[str, Any]) -> str:
    """Loss parts, S_c on adversarial batches and beta over optimiser steps, as small panels."""
    log = results.get("training") or {}
    steps = log.get("step") or []

    def series(name: str, field: str, role: str) -> list[charts.Line]:
        points = [(s, v if is_number(v) else None) for s, v in zip(steps, log.get(field) or [], strict=False)]
        return [_thinned(name, role, points)] if any(value is not None for _, value in points) else []

    panels = (
        (
            "Task loss",
            "loss (nats)",
            series("clean", "loss_clean", "clean") + series("adversarial", "loss_adv", "immunised"),
        ),
        (
            "Total and contrastive loss",
            "loss (nats)",
            series("total", "loss", "total") + series("contrastive", "loss_contrastive", "part-loss"),
        ),
        ("S_c on adversarial batches", "S_c (no unit)", series("S_c", "s_c_adv", "immunised")),
        ("Weight of consistency in the attack", "beta (no unit)", series("beta", "beta", "immunised")),
    )
    cards = []
    for title, unit, lines in panels:
        heading = _subscripted(title)
        if not lines:
            cards.append(f"<h3>{heading}</h3>{absent('Not recorded in this run.')}")
            continue
        values = [value for line in lines for _, value in line.points if value is not None]
        values += [value for line in lines for _, low, high in line.band for value in (low, high)]
        y = charts.number_axis(unit, [0.0, *values], ticks=4)
        x = charts.number_axis("optimiser step", [0.0, *[s for line in lines for s, _ in line.points]])
        ends = ", ".join(f"{line.name} ends at {findings.decimal(_last(line))}" for line in lines)
        chart = charts.line_chart(
            lines, x, y, f"{title} over optimiser steps: {ends}.", label_ends=len(lines) > 1, height=230
        )
        cards.append(f"<h3>{heading}</h3>{_figure(chart)}")
    if not any(lines for _, _, lines in panels):
        return absent("These results come from an evaluation alone; there is no training log in them.")
    seconds = log.get("seconds")
    about = f"Immunising took {findings.duration(seconds)}. " if is_number(seconds) else ""
    if len(steps) > _DRAWN_POINTS:
        about += (
            f"Lines are means over {-(-len(steps) // _DRAWN_POINTS)} logged steps each; the shade spans their range."
        )
    return (_about(about) if about else "") + _pair(*cards)


def overhead(results: dict[str, Any]) -> str:
    """Time and memory of an MBAT step beside a clean fine-tuning step."""
    cost = results.get("overhead") or {}
    bars: list[tuple[str, str, float, str]] = []
    for what, field, clean_text, immune_text in (
        ("time", "time_ratio", cost.get("clean_step_s"), cost.get("mbat_step_s")),
        ("memory", "memory_ratio", None, None),
    ):
        ratio = cost.get(field)
        if is_number(ratio):
            seconds = [f" ({findings.duration(s)})" if is_number(s) else "" for s in (clean_text, immune_text)]
            bars.append((f"{what}, clean step", "clean", 1.0, f"1\N{MULTIPLICATION SIGN}{seconds[0]}"))
            bars.append((f"{what}, MBAT step", "immunised", ratio, f"{ratio:.3g}\N{MULTIPLICATION SIGN}{seconds[1]}"))
    if not bars:
        return absent("The cost of a training step was not measured in this run.")
    lacking = [what for what in ("time", "memory") if not is_number(cost.get(f"{what}_ratio"))]
    chart = charts.bar_chart(bars, "Bar chart: " + ", ".join(f"{name} {text}" for name, _, _, text in bars) + ".")
    how = str(cost.get("protocol") or "How it was measured was not recorded.")
    note = f'<p class="note">Peak {lacking[0]} was not measured.</p>' if lacking else ""
    about = "A training step of MBAT beside a clean one of the same model, batch and precision."
    return _about(about) + _pair(_figure(chart), f"<h3>How it was measured</h3>{escape(how)}{note}")


def _detector_rows(
    detected: Sequence[tuple[str, dict[str, Any]]], settings: dict[str, Any]
) -> list[tuple[str, list[str]]]:
    models = [model for _, model in detected]
    half = findings.eps_number(settings["eps"]) / 2

    def shares(field: str) -> list[str]:
        return [findings.percent(model["detection"].get(field)) for model in models]

    at_half = [
        next(
            (p.get("acc_robust") for p in m.get("curve") or [] if abs(findings.eps_number(p["eps"]) - half) < 1e-6),
            None,
        )
        for m in models
    ]
    return [
        ("AUROC", [findings.decimal(model["detection"].get("auroc")) for model in models]),
        ("Attacks found at 1% false positives", shares("tpr_at_1_fpr")),
        ("Attacks found at 5% false positives", shares("tpr_at_5_fpr")),
        ("Threshold, tau", [findings.decimal(model["detection"].get("threshold")) for model in models]),
        ("Clean inputs rejected at it", shares("clean_rejection_rate")),
        ("Robust accuracy with rejection", shares("acc_robust_with_rejection")),
        ("Robust accuracy without", [findings.percent(model["acc_robust"]) for model in models]),
        (f"Robust accuracy at eps/2 ({findings.eps_text(half)})", [findings.percent(value) for value in at_half]),
    ]


def _figure(chart: str, entries: Sequence[tuple[str, str]] = (), kind: str = "marker") -> str:
    """A chart under its legend; `entries` are (role, text), `kind` how `charts.swatch` draws a role."""
    keys = "".join(f'<li class="key">{charts.swatch(role, kind)}{escape(text)}</li>' for role, text in entries)
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    return f"<figure>{legend}{chart}</figure>"


def _about(words: str) -> str:
    return f'<p class="about">{_subscripted(words)}</p>'


def _subscripted(words: str) -> str:
    return words.replace("S_c", "S<sub>c</sub>")


def _pair(*cards: str) -> str:
    """Cards side by side, one under another where the window is narrow."""
    return f'<div class="pair">{"".join(f"<div class=card>{card}</div>" for card in cards)}</div>'


def _missing(results: dict[str, Any], shown: Sequence[str], what: str) -> str:
    names = [findings.model_name(results, key) for key, _ in findings.measured(results) if key not in shown]
    return f'<p class="note">For {" and ".join(names)}, {escape(what)} was not measured.</p>' if names else ""


def _corners(fpr: Sequence[float], tpr: Sequence[float]) -> list[tuple[float, float | None]]:
    """The ROC as a staircase (between two measured points the lower rate is what is known), without repeated points."""
    corners: list[tuple[float, float | None]] = []
    previous = 0.0
    for false, true in zip(fpr, tpr, strict=False):
        for corner in ((max(false, _LOWEST_FPR), previous), (max(false, _LOWEST_FPR), true)):
            if not corners or corners[-1] != corner:
                corners.append(corner)
        previous = true
    return corners


def _thinned(name: str, role: str, points: Sequence[tuple[float, float | None]]) -> charts.Line:
    """A line of at most `_DRAWN_POINTS` points: means over equal bins, with the band of what was averaged."""
    if len(points) <= _DRAWN_POINTS:
        return charts.Line(name, role, points)
    size = -(-len(points) // _DRAWN_POINTS)
    means: list[tuple[float, float | None]] = []
    band = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part if value is not None]
        middle = sum(step for step, _ in part) / len(part)
        means.append((middle, sum(values) / len(values) if values else None))
        if values:
            band.append((middle, min(values), max(values)))
    return charts.Line(name, role, means, band=band)


def _filled(shape: charts.Steps) -> list[float]:
    """The edges of the first and last bin that hold a sample."""
    filled = [i for i, share in enumerate(shape.heights) if share > 0]
    return [shape.edges[filled[0]], shape.edges[filled[-1] + 1]]


def _last(line: charts.Line) -> float | None:
    return next((value for _, value in reversed(line.points) if value is not None), None)


def _uncrowded(marks: Sequence[float], top: float) -> list[float]:
    """Those of `marks` whose tick texts do not touch, from the right: the large ones matter more."""
    kept: list[float] = []
    for mark in reversed(marks):
        if not kept or kept[-1] - mark >= 0.045 * top:
            kept.append(mark)
    return kept[::-1]


def _eps_unit(settings: dict[str, Any]) -> tuple[str, float]:
    norm = str(settings.get("norm") or "").lower()
    if norm == "l2":
        return "L2 distance, pixels in [0, 1]", 1.0
    return "n/255" + (f", {findings.norm_text(norm)}" if norm else ""), 255.0


def _eps_label(eps: float, scale: float) -> str:
    return f"{eps * scale:.4g}"
