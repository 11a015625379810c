"""Data: samples from records of many formats, and the collator that makes batches of them.

Names load on first use, so that data can be checked without loading PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmai_fast.lazy import lazily

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

__getattr__ = lazily(
    __name__,
    {
        "FORMATS": "formats",
        "SPLITS": "splits",
        "DataSource": "sources",
        "EasyVQA": "easyvqa",
        "Format": "formats",
        "Sample": "sample",
        "VQACollator": "collate",
        "answer_choices": "easyvqa",
        "data_format": "formats",
        "format_prompt": "prompt",
        "load_dataset": "sources",
        "numeric_id": "sample",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
