"""The models on a page: how each looks, what it is called in a sentence, and which two a headline compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cmai_fast.evaluation.results import ModelResults, Results

HUES = 10  # colours in style.css; 0 is kept for the first undefended model
_MARKERS = ("square", "circle", "triangle", "diamond")
_DASHES = {"undefended": "dashed", "immunised": "solid", "baseline": "dotted"}


@dataclass(frozen=True)
class Shown:
    """A model with the look it keeps on the whole page.

    `look` are the CSS classes of its colour and its kind of line. Colour and marker tell models apart, the kind of
    line tells roles apart, so that nothing rests on colour alone.
    """

    record: ModelResults
    look: str
    marker: str

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def role(self) -> str:
        return self.record["role"]

    @property
    def phrase(self) -> str:
        """The model in a sentence: "the undefended model" where its role is its name, else its name."""
        return f"the {self.name} model" if self.name == self.role else self.name

    @property
    def introduced(self) -> str:
        """The same where a reader meets it first: its role beside a name that does not say it."""
        return self.phrase if self.name == self.role else f"{self.name} ({self.role})"


def shown(results: Results) -> list[Shown]:
    """The models in the order of the results, each with its look."""
    first = next((model["name"] for model in results["models"] if model["role"] == "undefended"), None)
    models, used = [], 0
    for model in results["models"]:
        dash = _DASHES[model["role"]]
        if model["name"] == first:
            models.append(Shown(model, f"hue0 {dash}", "circle"))
        else:
            models.append(Shown(model, f"hue{1 + used % (HUES - 1)} {dash}", _MARKERS[used % len(_MARKERS)]))
            used += 1
    return models


def standing(model: Shown) -> tuple[float, float]:
    """What models are ranked by: robust accuracy, then clean accuracy."""
    return model.record["acc_robust"], model.record["acc_clean"]


def ranked(models: Sequence[Shown]) -> list[Shown]:
    """The models, the most robust first."""
    return sorted(models, key=standing, reverse=True)


def compared(models: Sequence[Shown]) -> tuple[Shown, Shown] | None:
    """The two that a headline compares: the best undefended and the best defended model.

    Where one of the two kinds is missing: the least and the most robust model. None for a single model.
    """
    if len(models) < 2:
        return None
    undefended = [model for model in models if model.role == "undefended"]
    defended = [model for model in models if model.role != "undefended"]
    if undefended and defended:
        return max(undefended, key=standing), max(defended, key=standing)
    order = ranked(models)
    return order[-1], order[0]
