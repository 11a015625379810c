"""Data: samples from records of many formats, and the collator that makes batches of them.

Names load on first use, so that data can be checked without loading PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmai_fast.data.collate import VQACollator
    from cmai_fast.data.easyvqa import EasyVQA, answer_choices
    from cmai_fast.data.formats import FORMATS, Format, data_format
    from cmai_fast.data.prompt import format_prompt
    from cmai_fast.data.sample import Sample, numeric_id
    from cmai_fast.data.sources import DataSource, load_dataset
    from cmai_fast.data.splits import SPLITS

__all__ = [
    "FORMATS",
    "SPLITS",
    "DataSource",
    "EasyVQA",
    "Format",
    "Sample",
    "VQACollator",
    "answer_choices",
    "data_format",
    "format_prompt",
    "load_dataset",
    "numeric_id",
]

_HOMES = {
    "FORMATS": "cmai_fast.data.formats",
    "SPLITS": "cmai_fast.data.splits",
    "DataSource": "cmai_fast.data.sources",
    "EasyVQA": "cmai_fast.data.easyvqa",
    "Format": "cmai_fast.data.formats",
    "Sample": "cmai_fast.data.sample",
    "VQACollator": "cmai_fast.data.collate",
    "answer_choices": "cmai_fast.data.easyvqa",
    "data_format": "cmai_fast.data.formats",
    "format_prompt": "cmai_fast.data.prompt",
    "load_dataset": "cmai_fast.data.sources",
    "numeric_id": "cmai_fast.data.sample",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
