"""Datasets in their official formats, and the collator that feeds them to a model."""

from cmai_fast.data.collate import VQACollator
from cmai_fast.data.easyvqa import EasyVQA, answer_choices
from cmai_fast.data.prompt import format_prompt
from cmai_fast.data.sample import Sample, numeric_id

DATASETS = {EasyVQA.name: EasyVQA}


def load_dataset(name: str, split: str, limit: int | None = None, seed: int = 0) -> EasyVQA:
    """The dataset called `name`; raises ValueError naming the known ones."""
    if name not in DATASETS:
        raise ValueError(f"unknown data {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name](split, limit, seed)


__all__ = [
    "DATASETS",
    "EasyVQA",
    "Sample",
    "VQACollator",
    "answer_choices",
    "format_prompt",
    "load_dataset",
    "numeric_id",
]
