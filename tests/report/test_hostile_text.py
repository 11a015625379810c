"""Whatever stands in the results, the page stays a page: markup, quotes, endless words, other directions."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cmai_fast.report import render_report
from html_pages import element, parsed, section, visible
from invented_results import fake_results, fake_results_of

SCRIPT = "<script>alert(1)</script>\"'&{{ 7*7 }}"
_KEPT = ("eps", "norm", "role")  # what has to mean something


def poisoned(value: Any, text: str, key: str = "") -> Any:
    """`value` with `text` in place of each text and among the keys of each free dictionary."""
    if isinstance(value, dict):
        free = {text: text} if key in ("settings", "versions", "overhead", "answers") else {}
        changed = {k: poisoned(v, text, k) for k, v in value.items()} | free
        if key == "attacks":
            changed = {f"{text}{k}": v for k, v in changed.items()}
        if "role" in value:
            changed |= {"name": f"{text}{value['name']}", "path": text, "task": text, "precision": text}
            changed["metrics"] = {"clean": {text: 0.5}, "robust": {text: 0.25}}
        if "check" in value:
            changed["check"] = f"{text}{value['check']}"
        return changed
    if isinstance(value, list):
        return [poisoned(item, text, key) for item in value]
    return text if isinstance(value, str) and key not in _KEPT else value


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_markup_is_shown_as_text_in_every_field(count: int) -> None:
    results = fake_results() if count < 3 else fake_results_of(count)
    results["models"] = results["models"][-count:]
    results["settings"]["curve_attack"] = "pgd"
    page = render_report(poisoned(results, SCRIPT))
    assert not {
        name for name in parsed(page).attributes if name.startswith("on") or not name.replace("-", "").isalnum()
    }
    assert "<script>alert" not in page and page.count("<script>") == 1
    assert SCRIPT in visible(page) and "49" not in re.findall(r"alert\S+ (\S+)", visible(page))
    for anchor in ("accuracy", "eps", "consistency", "pictures", "sanity", "protocol"):
        assert "&lt;script&gt;alert(1)" in section(page, anchor), anchor
    assert "&lt;script&gt;alert(1)" in element(page, "header") and "&lt;script&gt;" in element(page, "title")
    assert "base64" not in section(page, "pictures")  # what is no PNG is not put into the page


def test_every_text_of_another_direction_is_isolated_from_the_page() -> None:
    arabic, override = "\u0645\u0631\u062d\u0628\u0627", "\u202eevil"
    for text in (arabic, override):
        page = render_report(poisoned(fake_results_of(3), text))
        for card in re.findall(r'<article class="card picture">.*?</article>', page, re.DOTALL):
            assert text not in re.sub(r"<bdi>.*?</bdi>", "", card, flags=re.DOTALL)
        names = re.findall(r'<span class="key">.*?</span>', page, re.DOTALL)
        assert names and all(f"<bdi>{text}" in name for name in names)


def test_a_very_long_word_has_nowhere_that_it_may_not_break() -> None:
    page = render_report(poisoned(fake_results_of(3), "w" * 3000 + "-" + "x" * 3000))
    parsed(page)
    assert not re.search(r'class="whole">[^<]{30}', page)
    assert not re.search(r'<text class="end[^>]*>w', page)  # names at the ends of lines would push the lines out
    assert "overflow-wrap: anywhere" in page


@pytest.mark.parametrize("text", ["", " ", "\x00", "\n", "0", "None"])
def test_empty_and_odd_texts_are_drawn(text: str) -> None:
    parsed(render_report(poisoned(fake_results(), text)))
