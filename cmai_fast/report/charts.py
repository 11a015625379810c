"""Charts as inline SVG, drawn by hand: lines, step histograms and bars, in the colours of the page around them.

Colours, dashes and fonts come from CSS classes (`templates/style.css`), so one drawing serves light, dark and paper: a
`look` is the classes of a model (`models.Shown`) or of a thing that is the same on every page (`clean`, `chance`, ...).
All text is escaped here, so the drawings are Markup. Coordinates are in CSS pixels of a 460-wide drawing that scales
with its column, so text stays readable in a phone's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDTH = 460
_LEFT, _TOP, _BOTTOM = 48, 34, 46
_CHARACTER = 8.0  # a generous mean advance of the 12 to 13.5 px system font: room for labels at the ends of lines


@dataclass(frozen=True)
class Axis:
    """One axis: its title with the unit, its range, and where ticks stand: (value, text) pairs."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Pixel of `value` when low is at pixel `start` and high at `end`; values outside are put on the border."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return start + (value - low) / (high - low) * (end - start)


@dataclass(frozen=True)
class Line:
    """One line: (x, y) points, a None breaks it; `tips` are texts shown over points; `band` holds (x, low, high)."""

    name: str
    look: str
    points: Sequence[tuple[float, float | None]]
    tips: Sequence[str] = ()
    band: Sequence[tuple[float, float, float]] = ()
    marker: str = ""


@dataclass(frozen=True)
class Steps:
    """One histogram: n + 1 bin edges and n heights."""

    name: str
    look: str
    edges: Sequence[float]
    heights: Sequence[float]


def number_axis(title: str, values: Sequence[float], *, ticks: int = 5) -> Axis:
    """An axis over `values` with round ticks (1, 2 or 5 times a power of ten)."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = (0.0, 1.0) if abs(high) < 1e-9 else (min(0.0, 2 * low), max(0.0, 2 * high))
    rough = (high - low) / ticks
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    marks = tuple((i * step, _signed(f"{i * step:,.{decimals}f}")) for i in range(first, last + 1))
    return Axis(title, first * step, last * step, marks)


def percent_axis(title: str, high: float = 1.0) -> Axis:
    """An axis from 0 to `high` (a share), its ticks in percent; 0 is always on it, so heights can be compared."""
    axis = number_axis(title, [0.0, 100 * high])
    return Axis(title, 0.0, axis.high / 100, tuple((value / 100, f"{text}%") for value, text in axis.ticks))


def line_chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    description: str,
    *,
    rules: Sequence[tuple[float, str]] = (),
    label_ends: bool = True,
    height: int = 300,
) -> Markup:
    """Lines over numeric axes as an `<svg>`.

    `description` is read out by screen readers. `rules` are labelled vertical lines (x, text). With `label_ends` each
    line carries its name at its right end, kept apart from the others'.
    """
    room = 14 + (max(len(line.name) for line in lines) * _CHARACTER if label_ends else 4)
    right, bottom = WIDTH - room, height - _BOTTOM
    parts = [_frame(x, y, right, bottom), *(_rule(x, value, text, right, bottom) for value, text in rules)]
    ends = []
    for line in lines:
        placed = [
            (x.place(px, _LEFT, right), None if py is None else y.place(py, bottom, _TOP)) for px, py in line.points
        ]
        if line.band:
            upper = [(x.place(px, _LEFT, right), y.place(high, bottom, _TOP)) for px, _, high in line.band]
            lower = [(x.place(px, _LEFT, right), y.place(low, bottom, _TOP)) for px, low, _ in line.band]
            parts.append(f'<path class="band {line.look}" d="{_path(upper + lower[::-1])}Z"/>')
        parts.append(f'<path class="line {line.look}" d="{_path(placed)}"/>')
        drawn = [(i, px, py) for i, (px, py) in enumerate(placed) if py is not None]
        for i, px, py in drawn:
            if line.marker:
                parts.append(_marker(line.look, line.marker, px, py))
            if i < len(line.tips):
                tip = escape(line.tips[i], quote=True)
                parts.append(f'<circle class="hit" data-tip="{tip}" cx="{px:.1f}" cy="{py:.1f}" r="11"/>')
        if drawn and label_ends:
            ends.append((drawn[-1][2], drawn[-1][1], line))
    for beside in _columns(ends):
        for label_y, (_, px, line) in zip(_spread([end[0] for end in beside]), beside, strict=True):
            parts.append(_text(px + 9, label_y + 4, line.name, f"end {line.look}"))
    return _svg(parts, description, height)


def histogram_chart(
    shapes: Sequence[Steps],
    x: Axis,
    y: Axis,
    description: str,
    *,
    rule: tuple[float, str] | None = None,
    height: int = 260,
) -> Markup:
    """Step histograms laid over each other as an `<svg>`; heights are shares of each one's own samples."""
    right, bottom = WIDTH - 16.0, float(height - _BOTTOM)
    parts = [_frame(x, y, right, bottom)]
    for shape in shapes:
        outline = [(x.place(shape.edges[0], _LEFT, right), bottom)]
        for i, share in enumerate(shape.heights):
            level = y.place(share, bottom, _TOP)
            outline += [(x.place(edge, _LEFT, right), level) for edge in (shape.edges[i], shape.edges[i + 1])]
        outline.append((x.place(shape.edges[-1], _LEFT, right), bottom))
        parts.append(f'<path class="area {shape.look}" d="{_path(outline)}Z"/>')
        parts.append(f'<path class="line {shape.look}" d="{_path(outline)}"/>')
    if rule:
        parts.append(_rule(x, *rule, right, bottom))
    if len({tuple(shape.edges) for shape in shapes}) == 1:
        edges = shapes[0].edges
        for i in range(len(edges) - 1):
            a, b = x.place(edges[i], _LEFT, right), x.place(edges[i + 1], _LEFT, right)
            shares = ", ".join(f"{shape.name} {100 * shape.heights[i]:.1f}%" for shape in shapes)
            tip = escape(_signed(f"{edges[i]:.2f} to {edges[i + 1]:.2f}: {shares}"), quote=True)
            place = f'x="{a:.1f}" y="{_TOP}" width="{b - a:.1f}" height="{bottom - _TOP}"'
            parts.append(f'<rect class="hit" data-tip="{tip}" {place}/>')
    return _svg(parts, description, height)


def bar_chart(bars: Sequence[tuple[str, str, float, str]], description: str) -> Markup:
    """Horizontal bars from zero as an `<svg>`; a bar is (name, look, value, text at its end)."""
    longest = max(value for _, _, value, _ in bars) or 1.0
    start = 12 + _CHARACTER * max(len(name) for name, *_ in bars)
    room = WIDTH - start - 14 - _CHARACTER * max(len(text) for *_, text in bars)
    parts = []
    for i, (name, look, value, text) in enumerate(bars):
        top, length = 8 + 32 * i, max(2.0, room * value / longest)
        parts.append(_text(start - 8, top + 16, name, "name"))
        parts.append(f'<rect class="bar {look}" x="{start:.1f}" y="{top}" width="{length:.1f}" height="22" rx="3"/>')
        parts.append(_text(start + length + 8, top + 16, text, "value"))
    parts.append(f'<path class="axis" d="M{start:.1f} 2V{8 + 32 * len(bars) - 4}"/>')
    return _svg(parts, description, 8 + 32 * len(bars))


def swatch(look: str, kind: str = "line", marker: str = "") -> Markup:
    """The key of a legend, drawn as in the chart: a `line`, with its marker if it has one, or the `area` of a
    histogram."""
    if kind == "area":
        inside = f'<path class="area {look}" d="M3 1H25V15H3Z"/><path class="line {look}" d="M3 1H25V15H3Z"/>'
    else:
        inside = f'<path class="line {look}" d="M1 8H27"/>' + (_marker(look, marker, 14, 8) if marker else "")
    return Markup(f'<svg class="swatch" viewBox="0 0 28 16" width="28" height="16" aria-hidden="true">{inside}</svg>')


def _svg(parts: Sequence[str], description: str, height: int) -> Markup:
    label = escape(description, quote=True)
    shape = f'class="chart" viewBox="0 0 {WIDTH} {height}" role="img"'
    return Markup(f'<svg {shape} aria-label="{label}">{"".join(parts)}</svg>')


def _frame(x: Axis, y: Axis, right: float, bottom: float) -> str:
    """Grid lines, tick texts and axis titles."""
    parts = []
    for value, text in y.ticks:
        level = y.place(value, bottom, _TOP)
        parts.append(f'<path class="grid" d="M{_LEFT} {level:.1f}H{right:.1f}"/>')
        parts.append(_text(_LEFT - 8, level + 4, text, "tick y"))
    for value, text in x.ticks:
        place = x.place(value, _LEFT, right)
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom}v5"/>')
        parts.append(_text(place, bottom + 19, text, "tick x"))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right:.1f}"/>')
    parts.append(_text((_LEFT + right) / 2, bottom + 39, x.title, "title x"))
    parts.append(_text(0, 11, y.title, "title"))
    return "".join(parts)


def _rule(x: Axis, value: float, text: str, right: float, bottom: float) -> str:
    """A labelled vertical line; the label stands on the side that has room."""
    place = x.place(value, _LEFT, right)
    left_side = right - place < len(text) * _CHARACTER
    label = _text(place, _TOP - 6, text, "rule before" if left_side else "rule")
    return f'<path class="rule" d="M{place:.1f} {_TOP}V{bottom}"/>{label}'


def _marker(look: str, shape: str, px: float, py: float) -> str:
    """One point of a line: the shape tells models apart without colour."""
    if shape == "circle":
        return f'<circle class="marker {look}" cx="{px:.1f}" cy="{py:.1f}" r="4.4"/>'
    if shape == "square":
        return f'<rect class="marker {look}" x="{px - 4:.1f}" y="{py - 4:.1f}" width="8" height="8"/>'
    corners = {"triangle": "M0 -5.4L5 3.8H-5Z", "diamond": "M0 -5.6L5 0L0 5.6L-5 0Z"}[shape]
    return f'<path class="marker {look}" transform="translate({px:.1f} {py:.1f})" d="{corners}"/>'


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """Path data through `points`; a None lifts the pen."""
    out, pen_down = [], False
    for px, py in points:
        if py is None:
            pen_down = False
            continue
        out.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = True
    return "".join(out)


def _columns(ends: Sequence[tuple[float, float, Line]], width: float = 100.0) -> list[list[tuple[float, float, Line]]]:
    """Ends of lines (y, x, line) whose names may meet, each column from top to bottom."""
    columns: list[list[tuple[float, float, Line]]] = []
    for end in sorted(ends, key=lambda end: end[1]):
        if columns and end[1] - columns[-1][-1][1] < width:
            columns[-1].append(end)
        else:
            columns.append([end])
    return [sorted(column, key=lambda end: end[0]) for column in columns]


def _spread(heights: Sequence[float], gap: float = 16.0) -> list[float]:
    """Ascending label positions at least `gap` apart, moved down only as far as needed, as a whole back up by half."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    shift = (placed[-1] - heights[-1]) / 2 if placed else 0.0
    return [height - shift for height in placed]


def _signed(text: str) -> str:
    """`text` with typographic minus signs, which are as wide as the digits beside them."""
    return text.replace("-", "\N{MINUS SIGN}")


def _text(px: float, py: float, text: str, kind: str) -> str:
    shown = escape(text).replace("S_c", 'S<tspan class="sub" dy="3">c</tspan><tspan dy="-3">&#8203;</tspan>')
    return f'<text class="{kind}" x="{px:.1f}" y="{py:.1f}">{shown}</text>'
