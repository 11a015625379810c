"""VQA accuracy against the answers of ten people, as the official evaluation of VQA v2 counts it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cmai_fast.metrics.metric import metric

SCORERS = ("official", "lmms-eval")
_FEWEST = 4  # three matches besides the answer left out

_NUMBERS = {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset("a an the".split())
# Written without their apostrophes, these get them back.
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
you've
""".split()
}
# Those with two apostrophes, and one of the two missing.
_CONTRACTIONS |= {
    spelt: word
    for word in """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've
""".split()
    for spelt in (word.replace("'", "", 1), word[::-1].replace("'", "", 1)[::-1])
}
_CONTRACTIONS |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
_CONTRACTIONS |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
_CONTRACTIONS |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the other way round, also in the official code

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # more than these stay: the official code gives a flag in the place of the count
_THOUSANDS = {"official": re.compile(r"[0-9],[0-9]"), "lmms-eval": re.compile(r"\d,+\d")}


@metric("vqa-accuracy")
def vqa_accuracy(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> float:
    """VQA accuracy, mean over samples, in [0, 1]; the references are the ten human answers, repeats included."""
    return mean_score(predictions, references, "official")


def vqa_score(prediction: str, references: Sequence[str], scorer: str = "official") -> float:
    """Accuracy of one answer, in [0, 1] (Goyal et al., 2017; vqaEval.py of github.com/GT-Vision-Lab/VQA).

        mean over the people i of min(1, matches among the answers of the others / 3)

    Answers are compared as they are if all people gave the same one, else normalised: lower case, without articles and
    punctuation, digits for number words, apostrophes in contractions. So "Red" against ten times "red" scores 0.

    Args:
        prediction: the answer.
        references: the answers of all people, repeats included, in any order; ten in VQA v2.
        scorer: `official`, or `lmms-eval`, which always normalises.

    Raises:
        ValueError: an unknown scorer, or fewer than 4 references.
    """
    if scorer not in SCORERS:
        raise ValueError(f"unknown scorer {scorer!r} of VQA accuracy; expected one of {', '.join(SCORERS)}")
    if isinstance(references, str) or len(references) < _FEWEST:
        raise ValueError(
            f"VQA accuracy got the references {references!r}; expected the answers of all people (ten in VQA v2), "
            "repeats included. For one right answer use exact-match"
        )
    said, *answers = (_trimmed(text) for text in (prediction, *references))
    if scorer == "lmms-eval" or len(set(answers)) > 1:
        said, *answers = (normalized(text, scorer) for text in (said, *answers))
    same = [answer == said for answer in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def normalized(answer: str, scorer: str = "official") -> str:
    """The answer as it is compared: lower case, no punctuation, no articles, digits, contractions with apostrophes."""
    return _words(_without_marks(answer, _THOUSANDS[scorer]))


def mean_score(predictions: Sequence[str], references: Sequence[tuple[str, ...]], scorer: str) -> float:
    """The mean of `vqa_score` over samples."""
    scores = [vqa_score(p, known, scorer) for p, known in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores)


def _trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str, thousands: re.Pattern[str]) -> str:
    out, number = text, thousands.search(text) is not None
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or number else " ")
    return _FULL_STOP.sub("", out, count=_FULL_STOPS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
