"""Names at the ends of lines."""

from __future__ import annotations

import re

from cmai_fast.report.charts import Axis, Line, line_chart

X, Y = Axis("time", 0.0, 10.0, ((0.0, "0"), (10.0, "10"))), Axis("share", 0.0, 1.0, ((0.0, "0"), (1.0, "1")))


def heights(*ends: tuple[str, float, float]) -> dict[str, float]:
    lines = [Line(name, name, [(0.0, 0.5), (x, y)]) for name, x, y in ends]
    chart = str(line_chart(lines, X, Y, "lines"))
    return {name: float(y) for y, name in re.findall(r'<text class="end [^>]* y="([\d.]+)">([^<]*)<', chart)}


def test_names_that_would_meet_are_kept_apart():
    placed = heights(("a", 10.0, 0.50), ("b", 10.0, 0.49))
    assert placed["b"] - placed["a"] >= 15.9


def test_names_in_other_places_stay_at_their_lines():
    alone = heights(("a", 2.0, 0.50))["a"]
    assert heights(("a", 2.0, 0.50), ("b", 10.0, 0.49))["a"] == alone
