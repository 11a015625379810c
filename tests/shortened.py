"""Workflows in short: six questions that the fitted model answers, checks of few steps, few samples to train on."""

from __future__ import annotations

from functools import partial

from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation import protocol, sanity
from cmai_fast.evaluation.overhead import step_overhead
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.workflows import attack, evaluate, immunize
from fitted import colours


def shorten(patch) -> None:
    for workflow in (attack, evaluate, immunize):
        patch.setattr(workflow, "asked", lambda *args: colours()[::2])
    shorten_checks(patch)


def shorten_checks(patch) -> None:
    patch.setattr(sanity, "_LARGE", (AttackSpec("pgd", 2), AttackSpec("apgd", 2)))
    patch.setattr(protocol, "CURVE_EPS", (2 / 255, 16 / 255))
    patch.setattr(immunize, "step_overhead", partial(step_overhead, rounds=1))


def shorten_training_data(patch) -> None:
    """At most 512 samples to train on, more than a run of a few steps draws. What is said of each picture is read from
    all of them, and the 36,000 of easy-VQA take seconds a run."""
    load = DataSource.load

    def few(self, split, limit=None, seed=0):
        return load(self, split, 512 if split == "train" and limit is None else limit, seed)

    patch.setattr(DataSource, "load", few)
