"""Captions for the tests of caption metrics, and what pycocoevalcap 1.2 with its Java tokenizer gives for them."""

from __future__ import annotations

PREDICTIONS = (
    "A brown dog runs on the beach.",
    "two cats sleep on the couch",
    "The man can't ride his bike at 5 p.m. today",
    "A red-and-white bus (no. 12) stops near St. James",
    "a a a a a a",
    "Nothing to see here!",
    "",
    "A kitchen with a stove and a refrigerator and a sink and a table and chairs and lamps",
)
REFERENCES = (
    ("A brown dog is running on a beach.", "The dog runs along the beach", "dog on sand"),
    ("Two cats are sleeping on a couch.", "A couch with two cats"),
    ("A man can't ride a bike.", "The man's bike is broken; he cannot ride at 5 p.m.", "man with bike"),
    ("A red-and-white bus stops at St. James.", "Bus no. 12, red and white"),
    ("A pizza on a plate", "a slice of pizza"),
    ("An airplane in the sky",),
    ("A plate of food", "food on a plate"),
    ("A kitchen with a stove.", "A kitchen that has a stove and a sink"),
)

BLEU = (0.603174603165029, 0.48678686428371587, 0.3760896963938599, 0.2667910472204535)
ROUGE_L = (
    0.6853932584269663, 0.6069651741293532, 0.6338759958434361, 0.6944971537001898, 0.3696969696969697, 0.0, 0.0,
    0.6082621082621082,
)  # fmt: skip
CIDER = (
    2.1569900878042048, 2.3231103562542676, 1.9284201041664948, 1.6992620276948984, 0.05017856632288217, 0.0, 0.0,
    0.6348695128363993,
)  # fmt: skip
METEOR = 0.3271806486537329  # of all samples
