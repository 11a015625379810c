"""Data sets of the Hugging Face hub, or folders that `datasets` reads (needs `datasets`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from cmai_fast.data.formats.format import data_format
from cmai_fast.data.records import PICTURES, check_unique, sample_of
from cmai_fast.data.sample import Sample, SampleList


def check(place: str) -> None:
    if not place or place.startswith(":") or place.count(":") > 1:
        raise ValueError(f"hf:{place} has no name; expected hf:REPO or hf:REPO:CONFIG, as in hf:user/questions:en")
    if "datasets" not in sys.modules and find_spec("datasets") is None:
        raise ValueError(f"hf:{place} needs the package datasets: pip install 'cmai-fast[datasets]'")


def splits_of(place: str) -> tuple[str, ...]:
    """The names of the splits."""
    check(place)
    import datasets

    repo, _, config = place.partition(":")
    try:
        return tuple(datasets.get_dataset_split_names(repo, config or None))
    except Exception as error:  # from the network, the hub or the loading code
        raise ValueError(f"hf:{place} cannot be read: {error}") from error


def fingerprint(place: str) -> str:
    return f"hf:{place} " + " ".join(str(_load(place, split)._fingerprint) for split in splits_of(place))


@data_format("hf", takes="REPO[:CONFIG]", splits=splits_of, check=check, fingerprint=fingerprint, lone=True)
def read_hub(place: str, split: str, fields: Mapping[str, str]) -> HubSamples:
    return HubSamples(_load(place, split), f"hf:{place} {split}", fields)


def _load(place: str, split: str) -> Any:
    check(place)
    import datasets

    repo, _, config = place.partition(":")
    try:
        return datasets.load_dataset(repo, config or None, split=split)
    except Exception as error:  # from the network, the hub or the loading code
        raise ValueError(f"hf:{place} cannot be read: {error}") from error


class HubSamples(SampleList):
    """The rows of a `datasets.Dataset`; pictures stay encoded until a sample is accessed.

    Everything but the pictures (questions, answers, ids) is checked at once.
    """

    def __init__(self, data: Any, name: str, fields: Mapping[str, str]) -> None:
        import datasets

        self._name, self._fields = name, fields
        self._labels: dict[str, Any] = {}
        pictures = []
        for column, feature in data.features.items():
            inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
            encoded = datasets.Image(decode=False)
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, encoded)
            elif isinstance(inner, datasets.Image):
                data = data.cast_column(
                    column, [encoded] if isinstance(feature, list) else replace(feature, feature=encoded)
                )
            else:
                if isinstance(feature, datasets.ClassLabel):
                    self._labels[column] = feature
                continue
            pictures.append(column)
        self._data = data
        self._check(data.remove_columns(pictures))
        if len(self):
            self[0]  # finds pictures under an unknown key

    def _check(self, texts: Any) -> None:
        fields = {own: theirs for own, theirs in self._fields.items() if own not in PICTURES}
        check_unique(
            sample_of(self._named(row), self._where(i), i, None, fields, pictures=False) for i, row in enumerate(texts)
        )

    def _where(self, index: int) -> str:
        return f"{self._name} row {index + 1}"

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with names in place of class labels; -1, as in some test splits, becomes None."""
        known = {k: v for k, v in row.items() if k in self._labels}
        return dict(row) | {k: None if v is None or v < 0 else self._labels[k].int2str(v) for k, v in known.items()}

    def __len__(self) -> int:
        return len(self._data)

    def at(self, place: int) -> Sample:
        return sample_of(self._named(self._data[place]), self._where(place), place, None, self._fields)
