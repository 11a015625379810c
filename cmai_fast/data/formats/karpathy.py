"""The splits of COCO and Flickr30k that most papers on captions and retrieval use, as one JSON file each.

Source: Karpathy and Fei-Fei, 2015, "Deep Visual-Semantic Alignments"; `dataset_coco.json` and `dataset_flickr30k.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cmai_fast.data.formats.official import list_of, read_json, text_of
from cmai_fast.data.sample import Sample

SPLITS = ("train", "val", "test")
# Images of COCO's val2014 that are in neither val nor test. Papers add them to train.
_OWN = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_karpathy(
    file: Path, split: str, place: Callable[[dict[str, Any], str], tuple[str | int, str]]
) -> Iterator[Sample]:
    """One sample per image, with its sentences as references.

    Args:
        place: returns the id and the picture file of a record; its second argument is file and record, for errors.
    """
    for i, record in enumerate(list_of(read_json(file, _shorter), "images", file)):
        where = f"{file} images[{i}]"
        own = record.get("split") if isinstance(record, dict) else None
        if own not in _OWN:
            raise ValueError(f"{where}: split is {own!r:.60}; expected one of {', '.join(_OWN)}")
        if _OWN[own] != split:
            continue
        sentences = list_of(record, "sentences", Path(where))
        captions = [text_of({"raw": raw}, "raw", f"{where} sentences[{k}]") for k, raw in enumerate(sentences)]
        if not captions:
            raise ValueError(f"{where} has no sentences; expected at least one caption")
        name, picture = place(record, where)
        yield Sample(name, (picture,), "", tuple(captions), where=where)


def _shorter(value: dict[str, Any]) -> Any:
    """A sentence as its text alone: its tokens take several times the memory."""
    return value["raw"] if "raw" in value and "sentid" in value else value
