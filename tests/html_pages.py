"""A page of HTML as tests read it."""

from __future__ import annotations

import re
from html.parser import HTMLParser


def section(page: str, anchor: str) -> str:
    found = re.search(rf'<section id="{anchor}">(.*?)</section>', page, re.DOTALL)
    assert found, f"no section {anchor}"
    return found.group(1)


def element(page: str, tag: str) -> str:
    found = re.search(rf"<{tag}>.*?</{tag}>", page, re.DOTALL)
    assert found, f"no <{tag}>"
    return found.group(0)


def charts(html: str) -> int:
    return html.count('<svg class="chart"')


class Balance(HTMLParser):
    """Fails where tags are not closed in the order they were opened."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag == "small":
            self.texts.append(" ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing near {self.getpos()}"
        if tag in ("th", "td", "dt", "dd", "small", "li", "div"):
            self.texts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.open, f"left open: {parser.open}"
    return parser


def visible(page: str) -> str:
    return " ".join("".join(parsed(page).texts).split())
