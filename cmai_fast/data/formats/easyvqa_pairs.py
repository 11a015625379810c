"""Statements about two easy-VQA pictures, true or false, as NLVR2 has them about photos.

Each statement comes with four pairs of pictures, two of which it is true of; an id is SPLIT-STATEMENT-PAIR-0, in
NLVR2's form. The statements are drawn with a fixed seed from what easy-VQA's questions say of its pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version

import numpy as np

from cmai_fast.data.easyvqa import COLORS, SHAPES, SPLITS, EasyVQA
from cmai_fast.data.formats.format import data_format
from cmai_fast.data.formats.official import TRUTH, no_fields
from cmai_fast.data.sample import Sample

STATEMENTS = {"train": 4000, "calibration": 100, "test": 200}
_DRAWN = 4096  # pairs per statement; the rarest statements are true of one pair in 64

# (colour, shape) indices of the left and of the right pictures (n, 2) -> (n,) bool
_Truth = Callable[[np.ndarray, np.ndarray], np.ndarray]


@data_format(
    "easyvqa-pairs",
    takes="",
    splits=lambda place: SPLITS,
    fingerprint=lambda place: f"easy-vqa pairs 1 {version('easy-vqa')}",
)
def read_easyvqa_pairs(place: str, split: str, fields: Mapping[str, str]) -> Iterator[Sample]:
    no_fields("easyvqa-pairs", fields)
    data = EasyVQA(split)
    known = {k: v for k, v in data.facts().items() if None not in v}
    pictures, facts = list(known), np.array(list(known.values()))
    rng = np.random.default_rng(SPLITS.index(split))
    for number in range(STATEMENTS[split]):
        text, truth = _statement(rng)
        left, right = rng.integers(len(pictures), size=(2, _DRAWN))
        holds = truth(facts[left], facts[right])
        rows = [*np.flatnonzero(holds)[:2].tolist(), *np.flatnonzero(~holds)[:2].tolist()]
        for pair, row in enumerate(rng.permutation(rows).tolist()):
            images = data.picture(pictures[left[row]]), data.picture(pictures[right[row]])
            answer = "true" if holds[row] else "false"
            yield Sample(f"{split}-{number}-{pair}-0", images, text, (answer,), TRUTH)


def _statement(rng: np.random.Generator) -> tuple[str, _Truth]:
    """A statement and what it means."""
    kind = int(rng.integers(7))
    which, value, other = int(rng.integers(2)), 0, 0  # 0: of colours, 1: of shapes
    words = (COLORS, SHAPES)[which]
    value, other = rng.choice(len(words), 2, replace=False).tolist()
    noun = lambda i: f"a {words[i]} shape" if which == 0 else f"a {words[i]}"  # noqa: E731
    side = int(rng.integers(2))
    if kind == 0:
        return f"Both images show {noun(value)}.", lambda a, b: (a[:, which] == value) & (b[:, which] == value)
    if kind == 1:
        return f"The images show the same {('color', 'shape')[which]}.", lambda a, b: a[:, which] == b[:, which]
    if kind == 2:
        color, shape = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
        text = f"The {('left', 'right')[side]} image shows a {COLORS[color]} {SHAPES[shape]}."
        return text, lambda a, b: ((a, b)[side] == [color, shape]).all(1)
    if kind == 3:
        text = f"The left image shows {noun(value)} and the right image shows {noun(other)}."
        return text, lambda a, b: (a[:, which] == value) & (b[:, which] == other)
    if kind == 4:
        return f"At least one image shows {noun(value)}.", lambda a, b: (a[:, which] == value) | (b[:, which] == value)
    if kind == 5:
        return f"No image shows {noun(value)}.", lambda a, b: (a[:, which] != value) & (b[:, which] != value)
    return f"The {('left', 'right')[side]} image shows {noun(value)}.", lambda a, b: (a, b)[side][:, which] == value
