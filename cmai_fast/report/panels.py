"""The sections of the report with charts. Each takes the results and gives what its template shows; None if nothing.

A few models share a chart with names at the ends of their lines, many get a legend; their tables turn round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cmai_fast.evaluation.results import Results, eps_number, is_number

from . import charts
from .models import Shown
from .tables import Table
from .words import decimal, duration, eps_text, listed, norm_text, percent

FEW = 3  # models that panels and columns can stand side by side for
_LABELLED = 4  # lines that can carry their names at their ends,
_LABEL = 16  # if none of the names has more characters
# Left end of the logarithmic axis: with 500 to 10,000 clean samples less than this is hardly measured.
_LOWEST_FPR = 1e-3
_DRAWN_POINTS = 120  # a longer training log is drawn as means over bins with their range
_TRAINED = "hue1 solid"  # the look of what only the trained model has


def robustness_curve(results: Results, models: Sequence[Shown]) -> dict[str, Any] | None:
    """Robust accuracy of the models over eps, as a chart and as the table behind it."""
    settings = results["settings"]
    unit, scale = _eps_unit(settings)
    lines, found = [], []
    for model in models:
        points = {
            eps_number(point["eps"]): point["acc_robust"]
            for point in model.record.get("curve") or []
            if is_number(point.get("acc_robust"))
        }
        if not points:
            continue
        points.setdefault(0.0, model.record["acc_clean"])  # nothing may be changed at eps 0
        ordered = sorted(points.items())
        tips = [f"{model.name}, eps {_eps_label(eps, scale)}: {percent(share)}" for eps, share in ordered]
        drawn = [(scale * eps, share) for eps, share in ordered]
        lines.append(charts.Line(model.name, model.look, drawn, tips, marker=model.marker))
        found.append((model, points))
    if not lines:
        return None
    everywhere = sorted({eps for _, points in found for eps in points})
    marks = [scale * eps for eps in everywhere]
    top = (marks[-1] or 1.0) * 1.02
    x = charts.Axis(f"eps ({unit})", 0.0, top, tuple((mark, f"{mark:.4g}") for mark in _uncrowded(marks, top)))
    headline = scale * eps_number(settings["eps"])
    ends = ", ".join(f"{line.name} {percent(line.points[-1][1])}" for line in lines)
    labelled = len(lines) <= _LABELLED and all(len(line.name) <= _LABEL for line in lines)
    chart = charts.line_chart(
        lines,
        x,
        charts.percent_axis("robust accuracy"),
        f"Line chart of robust accuracy over eps in {unit}. At eps {marks[-1]:.4g}: {ends}.",
        rules=[(headline, "headline eps")] if 0 < headline <= top else [],
        label_ends=labelled,
    )
    rows: list[tuple[Shown | str, list[str]]] = [
        (_eps_label(eps, scale), [percent(points.get(eps)) for _, points in found]) for eps in everywhere
    ]
    table = Table(f"eps ({unit})", [model for model, _ in found], rows)
    return {
        "chart": chart,
        "legend": [] if labelled else [_key(model) for model, _ in found],
        "table": table if len(found) <= FEW else table.turned("model"),
        "many": len(found) > FEW,
        "unit": unit,
        "attack": settings.get("curve_attack"),
        "missing": _missing(models, [model for model, _ in found]),
    }


def consistency(results: Results, models: Sequence[Shown]) -> dict[str, Any] | None:
    """Histograms of S_c, one panel per model, on common axes so that the panels can be compared."""
    found = [(model, shapes) for model in models if (shapes := _histograms(model))]
    if not found:
        return None
    steps = [shape for _, shapes in found for shape in shapes]
    filled = [edge for shape in steps for edge in _filled(shape)]
    margins = any((model.record.get("s_c") or {}).get("score") == "verifier" for model, _ in found)
    named = "score: log-odds of the answer against its alternatives" if margins else "S_c, a cosine"
    x = charts.number_axis(f"{named} (no unit)", filled, ticks=6)
    y = charts.percent_axis("share of samples per bin", max(max(shape.heights) for shape in steps))
    cards = []
    for model, shapes in found:
        tau = (model.record.get("detection") or {}).get("threshold")
        rule = (tau, "threshold: reject below") if is_number(tau) and x.low <= tau <= x.high else None
        s_c = model.record.get("s_c") or {}
        means = [(kind, (s_c.get(kind) or {}).get("mean")) for kind in ("clean", "adversarial")]
        said = ", ".join(f"{kind} mean {decimal(mean, 2)}" for kind, mean in means if is_number(mean))
        chart = charts.histogram_chart(shapes, x, y, f"Histogram of S_c for {model.name}: {said}.", rule=rule)
        legend = [(charts.swatch(shape.look, "area"), f"{shape.name} inputs") for shape in shapes]
        cards.append({"model": model, "chart": chart, "legend": legend, "said": said})
    summary = None
    if len(found) > FEW:
        summary = Table("model", ["clean mean", "adversarial mean", "threshold"], [_means(model) for model, _ in found])
    return {
        "cards": cards,
        "summary": summary,
        "over_eps": _scores_over_eps(results["settings"], [model for model, _ in found]),
        "missing": _missing(models, [model for model, _ in found]),
    }


def _scores_over_eps(settings: dict[str, Any], models: Sequence[Shown]) -> list[dict[str, Any]]:
    """The score of attacked inputs over eps, a chart per model, whose scores have no common unit."""
    unit, scale = _eps_unit(settings)
    cards = []
    for model in models:
        scored = [(p, score) for p in model.record.get("curve") or [] if (score := _score_of(p))]
        if not scored:
            continue
        at = [(scale * eps_number(p["eps"]), score) for p, score in scored]
        clean = ((model.record.get("s_c") or {}).get("clean") or {}).get("mean")
        points: list[tuple[float, float | None]] = [(place, score["mean"]) for place, score in at]
        band = [(place, score["low"], score["high"]) for place, score in at]
        tips = [f"eps {place:.4g}: mean {decimal(mean, 2)}" for place, mean in points]
        lines = [charts.Line("attacked", model.look, points, tips, band, marker=model.marker)]
        if is_number(clean):
            lines.append(charts.Line("clean mean", "clean", [(0.0, clean), (at[-1][0], clean)]))
        tau = (model.record.get("detection") or {}).get("threshold")
        if is_number(tau):
            lines.append(charts.Line("threshold", "chance", [(0.0, tau), (at[-1][0], tau)]))
        heights = [value for line in lines for _, value in line.points if value is not None]
        y = charts.number_axis("score (no unit)", [*heights, *(v for _, *ends in band for v in ends)], ticks=5)
        x = charts.number_axis(f"eps ({unit})", [0.0, *(place for place, _ in at)], ticks=6)
        passed = [(place, p.get("fooled_and_accepted")) for (place, _), (p, _) in zip(at, scored, strict=True)]
        shares = ", ".join(f"{percent(share)} at {place:.4g}" for place, share in passed if is_number(share))
        said = f"Score of attacked inputs over eps for {model.name}: mean, and the range of the middle 80%."
        note = f"Answered wrongly and accepted: {shares}." if shares else ""
        cards.append({"model": model, "chart": charts.line_chart(lines, x, y, said), "note": note})
    return cards


def detector(results: Results, models: Sequence[Shown]) -> dict[str, Any] | None:
    """ROC of the detector that rejects low S_c, and its working points."""
    detected = [model for model in models if model.record.get("detection")]
    if not detected:
        return None
    lines, legend, said = [], [], []
    for model in detected:
        detection = model.record.get("detection") or {}
        roc = detection.get("roc") or {}
        corners = _corners(roc.get("fpr") or [], roc.get("tpr") or [])
        if corners:
            lines.append(charts.Line(model.name, model.look, corners))
            said.append(f"{model.name}, AUROC {decimal(detection.get('auroc'))}")
            legend.append((charts.swatch(model.look), said[-1]))
        for key, adaptive in _adaptive(model).items():
            look = f"{model.look} adaptive"
            lines.append(charts.Line(key, look, _corners(adaptive["roc"]["fpr"], adaptive["roc"]["tpr"])))
            said.append(f"{model.name}, successful {key}, AUROC {decimal(adaptive['auroc'])}")
            legend.append((charts.swatch(look), said[-1]))
    chart = None
    if lines:
        said.append("chance, AUROC 0.5")
        legend.append((charts.swatch("chance"), said[-1]))
        chance = [(_LOWEST_FPR ** (1 - i / 40),) * 2 for i in range(41)]
        ticks = ((1e-3, "0.1%"), (1e-2, "1%"), (1e-1, "10%"), (1.0, "100%"))
        chart = charts.line_chart(
            [charts.Line("chance", "chance", chance), *lines],
            charts.Axis("false positive rate: clean inputs rejected (log scale)", _LOWEST_FPR, 1.0, ticks, log=True),
            charts.percent_axis("true positive rate: attacked inputs rejected"),
            f"ROC curve of the detector. {'; '.join(said)}.",
            rules=[(0.01, "1%"), (0.05, "5%")],
            label_ends=False,
            height=340,
        )
    table = Table("", list(detected), _detector_rows(detected, results["settings"]))
    return {
        "chart": chart,
        "legend": legend,
        "table": table if len(detected) <= FEW else table.turned("model"),
        "many": len(detected) > FEW,
        "missing": _missing(models, detected),
    }


def training(results: Results, models: Sequence[Shown]) -> dict[str, Any] | None:
    """Loss parts, S_c and what ARM moved over optimiser steps, as small panels."""
    log = results.get("training") or {}
    steps = log.get("step") or []

    def series(name: str, field: str, look: str, scale: float = 1.0) -> list[charts.Line]:
        points = [(s, scale * v if is_number(v) else None) for s, v in zip(steps, log.get(field) or [], strict=False)]
        return [_thinned(name, look, points)] if any(value is not None for _, value in points) else []

    def moved(name: str, scale: float = 1.0) -> list[charts.Line]:
        """The line of a setting, if ARM moved it."""
        values = {value for value in log.get(name) or [] if is_number(value)}
        return series(name, name, _TRAINED, scale) if values and max(values) - min(values) > 1e-6 * max(values) else []

    unit, scale = _eps_unit(results["settings"])
    of_task = log.get("objective", "task") == "task"
    panels = (
        (
            *(("Task loss", "loss (nats)") if of_task else ("Distance of image features", "distance (share)")),
            series("clean", "loss_clean", "clean") + series("adversarial", "loss_adv", _TRAINED),
        ),
        (
            "Total and contrastive loss",
            "loss (nats)",
            (series("total", "loss", "total") if of_task else [])
            + series("contrastive", "loss_contrastive", "part-loss")
            + series("of steps on S_c alone", "loss_consistency", "chance"),
        ),
        (
            "S_c, and ARM's threshold of its mean" if any(log.get("tau_train") or []) else "S_c of training images",
            "S_c (no unit)",
            series("clean", "s_c_clean", "clean")
            + series("adversarial", "s_c_adv", _TRAINED)
            + series("threshold", "tau_train", "chance"),
        ),
        ("ARM: weight of consistency in the attack", "beta (no unit)", moved("beta")),
        ("ARM: radius of the attack", f"eps ({unit})", moved("eps", scale)),
        ("ARM: weight of the adversarial branch", "lam (no unit)", moved("lam")),
    )
    cards = []
    for title, label, lines in panels:
        if not lines:
            continue  # a defence without this part, or a setting that stayed
        values = [value for line in lines for _, value in line.points if value is not None]
        values += [value for line in lines for _, low, high in line.band for value in (low, high)]
        y = charts.number_axis(label, [0.0, *values], ticks=4)
        x = charts.number_axis("optimiser step", [0.0, *[s for line in lines for s, _ in line.points]])
        ends = ", ".join(f"{line.name} ends at {decimal(_last(line))}" for line in lines)
        chart = charts.line_chart(
            lines, x, y, f"{title} over optimiser steps: {ends}.", label_ends=len(lines) > 1, height=230
        )
        cards.append({"title": title, "chart": chart})
    if not cards:
        return None
    binned = -(-len(steps) // _DRAWN_POINTS) if len(steps) > _DRAWN_POINTS else None
    return {"cards": cards, "took": duration(s) if is_number(s := log.get("seconds")) else None, "binned": binned}


def overhead(results: Results, models: Sequence[Shown]) -> dict[str, Any] | None:
    """Time and memory of a training step beside a clean fine-tuning step."""
    cost = results.get("overhead") or {}
    bars: list[tuple[str, str, float, str]] = []
    for what, field, clean_text, immune_text in (
        ("time", "time_ratio", cost.get("clean_step_s"), cost.get("mbat_step_s")),
        ("memory", "memory_ratio", None, None),
    ):
        ratio = cost.get(field)
        if is_number(ratio):
            seconds = [f" ({duration(s)})" if is_number(s) else "" for s in (clean_text, immune_text)]
            bars.append((f"{what}, clean step", "clean", 1.0, f"1\N{MULTIPLICATION SIGN}{seconds[0]}"))
            bars.append((f"{what}, MBAT step", _TRAINED, ratio, f"{ratio:.3g}\N{MULTIPLICATION SIGN}{seconds[1]}"))
    if not bars:
        return None
    return {
        "chart": charts.bar_chart(bars, "Bar chart: " + ", ".join(f"{name} {text}" for name, _, _, text in bars) + "."),
        "how": cost.get("protocol") or "How it was measured was not recorded.",
        "lacking": [what for what in ("time", "memory") if not is_number(cost.get(f"{what}_ratio"))],
    }


def _detector_rows(detected: Sequence[Shown], settings: dict[str, Any]) -> list[tuple[Shown | str, list[str]]]:
    """The working points; one that no model has is left out."""
    found = [model.record.get("detection") or {} for model in detected]
    half = eps_number(settings["eps"]) / 2
    at_half = [_at(model, half) for model in detected]

    def field(name: str) -> list[Any]:
        return [detection.get(name) for detection in found]

    rejecting = field("acc_robust_with_rejection")
    rows = (
        ("AUROC", field("auroc"), decimal),
        ("Attacks found at 1% false positives", field("tpr_at_1_fpr"), percent),
        ("Attacks found at 5% false positives", field("tpr_at_5_fpr"), percent),
        ("Successful attacks: AUROC", field("auroc_successful"), decimal),
        ("Successful attacks found at 5% false positives", field("tpr_at_5_fpr_successful"), percent),
        ("Successful adaptive attacks: AUROC", [_of_adaptive(m, "auroc") for m in detected], decimal),
        ("Threshold, tau", field("threshold"), decimal),
        ("Clean inputs rejected at it", field("clean_rejection_rate"), percent),
        ("Fooled and accepted, worst of the suite", field("fooled_and_accepted"), percent),
        ("Robust accuracy with rejection", rejecting, percent),
        ("Robust accuracy without", [m.record["acc_robust"] for m in detected] if any(rejecting) else [], percent),
        (f"Robust accuracy at eps/2 ({eps_text(half)})", at_half if any(rejecting) else [], percent),
    )
    return [(name, [write(v) for v in values]) for name, values, write in rows if any(map(is_number, values))]


def _of_adaptive(model: Shown, name: str) -> float | None:
    return min((detection[name] for detection in _adaptive(model).values()), default=None)


def _adaptive(model: Shown) -> dict[str, dict[str, Any]]:
    """Detection of successful attacks that know the guard, by attack."""
    found = (model.record.get("detection") or {}).get("successful") or {}
    names = {key: (attack or {}).get("name") for key, attack in (model.record.get("attacks") or {}).items()}
    return {key: detection for key, detection in found.items() if names.get(key) == "adaptive"}


def _at(model: Shown, eps: float) -> float | None:
    """Robust accuracy at a point of the curve."""
    curve = model.record.get("curve") or []
    return next((point.get("acc_robust") for point in curve if abs(eps_number(point["eps"]) - eps) < 1e-6), None)


def _histograms(model: Shown) -> list[charts.Steps]:
    shapes = []
    for kind in ("clean", "adversarial"):
        histogram = ((model.record.get("s_c") or {}).get(kind) or {}).get("histogram") or {}
        edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
        total = sum(counts)
        if total > 0 and len(edges) == len(counts) + 1:
            look = "clean" if kind == "clean" else model.look
            shapes.append(charts.Steps(kind, look, edges, [count / total for count in counts]))
    return shapes


def _score_of(point: Mapping[str, Any]) -> dict[str, float] | None:
    """The score at a point of the curve; None without one."""
    score = point.get("score")
    there = isinstance(score, dict) and all(is_number(score.get(key)) for key in ("mean", "low", "high"))
    return score if there else None


def _means(model: Shown) -> tuple[Shown | str, list[str]]:
    s_c = model.record.get("s_c") or {}
    cells = [decimal((s_c.get(kind) or {}).get("mean"), 2) for kind in ("clean", "adversarial")]
    return model, [*cells, decimal((model.record.get("detection") or {}).get("threshold"), 2)]


def _key(model: Shown) -> tuple[Markup, str]:
    return charts.swatch(model.look, marker=model.marker), model.name


def _missing(models: Sequence[Shown], found: Sequence[Shown]) -> str:
    """The names of the models that have no part in a section, for a sentence; empty if all have."""
    names = [model.name for model in models if model not in found]
    return listed(names) if names else ""


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


def _thinned(name: str, look: str, points: Sequence[tuple[float, float | None]]) -> charts.Line:
    """A line of at most `_DRAWN_POINTS` points: means over equal bins, with the band of what was averaged."""
    if len(points) <= _DRAWN_POINTS:
        return charts.Line(name, look, points)
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
    return charts.Line(name, look, means, band=band)


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
    return "n/255" + (f", {norm_text(norm)}" if norm else ""), 255.0


def _eps_label(eps: float, scale: float) -> str:
    return f"{eps * scale:.4g}"
