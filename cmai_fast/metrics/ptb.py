"""The tokenizer of the caption metrics, without Java: Penn Treebank tokens in lower case, without punctuation.

It gives what `pycocoevalcap.tokenizer.ptbtokenizer` gives, which runs `PTBTokenizer -preserveLines -lowerCase` of
Stanford CoreNLP 3.4.1 and removes 17 marks. The rules were written from the Penn Treebank conventions and from what
that program answers; `docs/ptb-tokenizer.md` has the measured agreement. It needs the standard library only.

At each place the longest match of all rules wins, and the first of them on a tie. A rule may look further than its
token: its length is the whole match, its token the group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache

from cmai_fast.metrics.ptb_words import ABBREVIATIONS, CHARACTERS, ENDING, NUMBERED, STARTERS

# Only these are removed. The list is that of pycocoevalcap, in upper case, so that -lrb- and the other brackets stay;
# so do "!!", "?!", quotes in a row, "&" and "/".
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

_FINAL = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "(": "-lrb-", ")": "-rrb-", "\u00ad": "-"}
_FINAL |= {"¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$", "\x80": "$"}
_FINAL |= {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_QUOTES = {"`": "‘‛‹\x91", "'": "’›\x92", "``": "“«\x93", "''": "”»\x94"}
_STRAIGHT = str.maketrans({curly: plain for plain, all_curly in _QUOTES.items() for curly in all_curly})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&mdash;": "--", "&ndash;": "--", "&quot;": "''", "&nbsp;": ""}


def tokenize(caption: str) -> str:
    """The tokens of one caption, joined by spaces: lower case, Penn Treebank rules, without punctuation.

    >>> tokenize("The dog's owner can't come (at 5 p.m.).")
    "the dog 's owner ca n't come -lrb- at 5 p.m. -rrb-"

    Line breaks count as spaces. A token may hold a no-break space ("1 1/2" is one token), as in the original.
    """
    return " ".join(next(_lines([caption])))


def tokenize_all(captions: Sequence[str]) -> list[str]:
    """The tokens of each caption, as `tokenize`, but exactly as if all captions were the lines of one file.

    That is how the original is called. It matters for a caption that ends in an abbreviation: the last token of "like
    an X." is "x" if the next caption starts with "The", and "x." if it starts with "Two".
    """
    return [" ".join(line) for line in _lines(captions)] if captions else []


class PTBTokenizer:
    """Takes the place of `PTBTokenizer` of pycocoevalcap, with the same call and result."""

    def tokenize(self, captions_for_image: Mapping[Hashable, Sequence[Mapping[str, str]]]) -> dict[Hashable, list[str]]:
        """{image: [{"caption": text}, ...]} to {image: [tokens, ...]}."""
        lines = iter(tokenize_all([c["caption"] for captions in captions_for_image.values() for c in captions]))
        return {image: [next(lines) for _ in captions] for image, captions in captions_for_image.items() if captions}


def _lines(captions: Sequence[str]) -> Iterator[list[str]]:
    text = "\n".join(_BREAKS.sub(" ", caption) for caption in captions)
    rules, place = _rules(), 0
    line: list[str] = []
    while place < len(text):
        plain = _PLAIN.match(text, place)
        if plain and (word := plain[1].lower()) not in _SPLIT:
            line.append(word)
            place = plain.end()
            continue
        best = found = None
        end = place
        for action, rule in rules:
            match = rule.match(text, place)
            if match and match.end() > end:
                best, found, end = action, match, match.end()
        if best is None or found is None:  # no token: white space, and characters that the original does not know
            if text[place] == "\n":
                yield line
                line = []
            place += 1
            continue
        place = found.end(found.lastindex or 0)
        token = best(found[found.lastindex or 0]).lower()
        if token and token not in PUNCTUATION:
            line.append(token)
    yield line


def _class(*names: str) -> str:
    """The inside of a character class: all ranges of the tables of these names."""
    ranges = " ".join(CHARACTERS[name] for name in names).split()
    return "".join("-".join(f"\\u{int(end, 16):04x}" for end in r.split("-")) for r in ranges)


def _word(token: str) -> str:
    return token.replace("\u00ad", "").replace("&amp;", "&") if len(token) > 1 else _FINAL.get(token, token)


def _straight(token: str) -> str:
    return _word(token).replace("&apos;", "'").translate(_STRAIGHT)


def _same(token: str) -> str:
    return token


def _unbroken(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _brackets(token: str) -> str:
    return _unbroken("".join(_FINAL[c] if c in "()" else c for c in token))


def _entity(token: str) -> str:
    return _ENTITIES[token.lower()]


_BREAKS = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]")
# Most of a caption; whole words that no other rule can lengthen.
_PLAIN = re.compile(r"([A-Za-z]+)(?: (?=[A-Za-z])|(?=\n|\Z))")
_SPLIT = frozenset("cannot gonna gotta lemme gimme wanna".split())


@lru_cache(maxsize=1)
def _rules() -> list[tuple[Callable[[str], str], re.Pattern[str]]]:
    """What a token becomes, and what matches it and may follow it."""
    soft = "\u00ad"
    letter, alnum = f"[{_class('letters', 'marks')}{soft}]", f"[{_class('letters', 'marks', 'digits')}{soft}]"
    plain, digit = f"[{_class('letters', 'digits')}]", f"[{_class('digits')}]"
    a, an = f"[A-Za-z{soft}]", f"[A-Za-z0-9{soft}]"
    quote = r"(?:['’\x92]|&apos;)"
    elided = f"(?:[dDlLoO]{quote}(?={an}{{2}}))?"  # d'Or, O'Brien
    part = f"(?:{a}(?:\\.{a})+\\.|{elided}{an}+)"
    number = f"(?:{digit}*(?:[.:,\u00ad\u066b\u066c]{digit}+)+|{digit}+)"
    slashed = f"[A-Za-z0-9]{an}*(?:-[A-Za-z]{a}*){{0,2}}"
    pairs = "(?:&|(?i:&amp;)|\\+)"
    ended = f"(?:{'|'.join(ENDING)}|(?:Ph|Ed)\\.D)\\."
    inside, last = r'[^\s<>"()|{}]', r'[^\s<>"()|{}.,?!-]'
    gap = r"[- \xa0]"
    name = "[A-Za-z][A-Za-z0-9_:.-]*"
    face, eye = "[-^x=~<>']", "[\\^x=~<>']"
    shapes = [
        f"{letter}{alnum}*(?:[.!?]{letter}{alnum}*)*",  # word, also without the space after a mark: end.Start
        f"{elided}{plain}+",
        f"{elided}{plain}+(?:[-_]{plain}+)+",
        f"{elided}[A-Za-z0-9][A-Za-z0-9.,{soft}]*(?:-{part})+",
        f"[A-Z]+(?:{pairs}[A-Z]+)+",  # AT&T
        f"{slashed}(?:\\\\?/{slashed}){{1,2}}",
        f"{a}(?:\\.{a})+",
    ]
    verb = "(?:[sSdDmM]|[lL][lL]|[rR][eE]|[vV][eE])"
    has = f"(?:['’\x92]|&apos;){verb}(?![A-Za-z])|[’\x92]{verb}"
    rules: list[tuple[Callable[[str], str], str]] = [
        (_unbroken, f"<{name}(?:[ \t]+{name}(?:[ \t]*=[ \t]*(?:'[^'\n]*'|\"[^\"\n]*\"))?)*[ \t]*/?>"),
        (_unbroken, f"</{name}>|<[!?][A-Za-z-][^>\n]*>"),
        (_entity, f"(?i:{'|'.join(_ENTITIES)})"),
        (_same, r"&#\d+;"),
        (_same, rf"(?i:https?)://{inside}+\.{inside}*{last}"),
        (_same, rf"(?i:www)\.(?:[A-Za-z0-9_-]+\.)*[A-Za-z0-9_]+(?:/{inside}+{last})?"),
        (_same, rf"(?:[A-Za-z][A-Za-z0-9]*\.)+(?:com|net|org|edu)(?:/{inside}+{last})?"),
        (_same, r"(?:<|&lt;)?[A-Za-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+(?:>|&gt;)?"),
        (_same, f"#{letter}+"),
        (_same, "@[A-Za-z_][A-Za-z0-9_]*"),
        *((_word, f"(?i:({word[:3]}){word[3:]})(?!{alnum})") for word in sorted(_SPLIT)),
        (_straight, f"({a}+)[nN](?:{quote}|`)[tT]"),
        (_straight, f"[nN](?:{quote}|`)[tT]"),
        (_same, f"[A-HJ-XZdlno]{quote}{letter}{{2,}}"),
        (_same, f"{letter}+[aeiouyAEIOUY]{quote}[aeiouA-Z]{letter}*"),
        (_same, f"(?:[dDjJlL]|ol|Ol|OL|[dD]unkin|[sS]omethin){quote}"),
        (_same, f"([yY]{quote}){letter}"),
        (_straight, has),
        *((_word, f"({shape})(?:{has})") for shape in shapes),
        (_same, "('[tT])(?i:is|was)"),
        (_same, f"{quote}(?i:em|cause|till?)"),
        (_same, f"{quote}[nN](?!{alnum})"),
        (_same, f"{quote}[nN]{quote}"),
        (_same, f"{quote}[2-9]0s"),
        (_same, f"{quote}{digit}{digit}(?=\\s)"),
        (_word, f"({ended})\\S"),
        *((_word, f"{shape}\\.(?=[,;:\u3001])") for shape in shapes[:6]),
        *((_word, shape) for shape in shapes),
        (_same, r"\d{1,2}/\d{1,2}"),
        (_unbroken, r"\d+[- \xa0]\d{1,2}/\d{1,2}"),
        (_word, f"[-+]?{number}"),
        (
            _brackets,
            f"(?:\\({digit}{{2,3}}\\)[ \xa0]?|(?:\\+\\+?)?(?:{digit}{{2,4}}{gap})?{digit}{{2,4}}{gap})"
            f"{digit}{{3,4}}{gap}?{digit}{{3,5}}",
        ),
        (_same, r"[A-Z]+\$"),
        (_same, f"(?:{'|'.join(ABBREVIATIONS)})\\."),
        (_same, ended),
        (_same, f"((?:{'|'.join(NUMBERED)})\\.)\\s*\\d"),
        (_word, f"{a}(?:\\.{a})*\\."),
        (_word, f"({a})\\.\\s+(?:(?:{'|'.join(STARTERS)})(?=\\s)|<[A-Za-z/])"),
        (lambda _: "...", r"\.{3,}|…|\. \. \."),
        (lambda _: "--", r"-{2,4}|[–—―\x96\x97]"),
        (_same, "-{5,}"),
        (_straight, "[`‘’‛“”‹›«»‚„‟\x91-\x94]{1,2}"),
        (lambda _: "''", "''|['\"]"),
        (_same, r"[!?]+"),
        (_word, r"[()\[\]{}]"),
        (_brackets, f"[<>]?[:;=][-o*']?[()DPdpO\\\\{{@|\\[\\]](?!{an})"),
        (_same, f"{face}_{face}"),
        (_brackets, f"\\({face}[_.]?{face}\\)|\\({eye}-{eye}\\)"),
        (_same, r"[cC]#|[cC]\+\+"),
        (_same, r"_+|#+|@+|\*+|(?:\\\*)+|<<|>>"),
        (_word, f"[.,:;/+{soft}{_class('symbols')}¢£€¤₠\x80¼½¾⅓⅔-]"),
    ]
    return [(action, re.compile(rule)) for action, rule in rules]
