"""Wrong captions that are nearly right: one object, attribute, number or place exchanged for another of its kind."""

from __future__ import annotations

import re

# Words that exclude each other in a caption. One is exchanged for another of its row.
_KINDS = tuple(
    tuple(row.split())
    for row in (
        "black white red green blue yellow brown gray orange pink purple teal",
        "one two three four five six",
        "small large",
        "young old",
        "short tall",
        "open closed",
        "empty full",
        "wooden metal plastic",
        "man woman boy girl",
        "men women boys girls",
        "his her",
        "he she",
        "dog cat horse cow sheep bird bear elephant giraffe zebra",
        "dogs cats horses cows birds bears elephants giraffes zebras",
        "car bus truck train motorcycle bicycle boat airplane",
        "cars buses trucks trains motorcycles bicycles boats airplanes",
        "pizza sandwich cake donut salad soup",
        "banana apple carrot broccoli tomato",
        "bananas apples carrots tomatoes",
        "table bed couch chair bench desk",
        "tables beds couches chairs benches desks",
        "laptop phone television keyboard clock book",
        "surfboard skateboard snowboard frisbee kite skis",
        "baseball tennis soccer basketball",
        "kitchen bathroom bedroom office restaurant",
        "street beach field forest mountain river ocean",
        "snow grass sand water",
        "day night",
        "inside outside",
        "left right",
        "above below",
        "sitting standing lying running walking jumping",
        "eating drinking sleeping",
        "circle rectangle triangle square",
    )
)
_OTHERS = {word: tuple(other for other in row if other != word) for row in _KINDS for word in row}
_WORD = re.compile(r"[A-Za-z]+")
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)$")


def perturbed(caption: str) -> tuple[str, ...]:
    """Captions that differ from this one in a single word: each word that is in the list, for each other of its kind.

    The order is that of the words, so that the same caption gives the same tuple; empty if no word is in the list.
    """
    found = []
    for match in _WORD.finditer(caption):
        word = match[0]
        for other in _OTHERS.get(word.lower(), ()):
            other = other.capitalize() if word[0].isupper() else other
            found.append(_with_article(caption[: match.start()], other) + other + caption[match.end() :])
    return tuple(found)


def _with_article(before: str, word: str) -> str:
    """The text before a word, with "a" or "an" as the word needs it."""
    vowel = word[0].lower() in "aeiou"
    return _ARTICLE.sub(lambda article: article[1] + ("n" if vowel else "") + article[2], before)
