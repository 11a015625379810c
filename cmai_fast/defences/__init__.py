"""Defences: ways to train a model against attacks, and baselines; one file per defence, found by name."""

from cmai_fast.defences.defence import DEFENCES, Defence, defence

__all__ = ["DEFENCES", "Defence", "defence"]
