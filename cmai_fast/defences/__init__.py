"""What a model is trained with, against attacks or to compare with: one file per defence, found by name."""

from cmai_fast.defences.defence import DEFENCES, Defence, defence

__all__ = ["DEFENCES", "Defence", "defence"]
