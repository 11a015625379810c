"""Checks the batch of a step, and makes the collator if none is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import default_data_collator

from cmai_fast.bridge import BatchImages, DualBridge, ModelBridge
from cmai_fast.data import Sample
from cmai_fast.data.collators import Collator, collator, kind_of
from cmai_fast.data.records import IDS
from cmai_fast.data.sample import numeric_id
from cmai_fast.data.statements import STATEMENT_ANSWERS, STATEMENT_IDS, Told
from cmai_fast.mbat import ranks
from cmai_fast.mbat.config import MBATConfig
from cmai_fast.mbat.parts import OF_SAMPLES, WEIGHTS


class RecordCollator:
    """The default collator of a trainer: `collator_of` for records, `default_data_collator` for rows that already hold
    the model's inputs.

    For heads, wrong answers are added if every record of a batch has some and gamma is above 0; for a verifier,
    `statements` about each record. Records without ids get no `sample_ids`, so that those of different batches and
    processes are told apart.
    """

    def __init__(
        self,
        processor: Any,
        bridge: ModelBridge,
        args: MBATConfig,
        statements: Told | None = None,
    ) -> None:
        # Not the bridge: workers that are spawned get a copy of all that is here.
        self.processor, self.kind, self.context, self.args = processor, kind_of(bridge), bridge.context, args
        self.statements = statements
        self._collators: dict[int, Collator] = {}

    def __call__(self, records: Sequence[Any]) -> dict[str, Tensor]:
        if isinstance(records[0], Mapping) and "labels" in records[0]:
            return default_data_collator(list(records))
        samples = [Sample.of(record, place) for place, record in enumerate(records)]
        wrong = all(any(c not in s.references for c in s.choices) for s in samples)
        batch = self._with_negatives(int(wrong and self.args.gamma > 0 and self.statements is None))(samples)
        if not all(map(_has_id, records)):
            del batch["sample_ids"]  # places in this batch
        return batch

    def _with_negatives(self, negatives: int) -> Collator:
        if negatives not in self._collators:
            self._collators[negatives] = collator(
                self.kind, self.processor, negatives, self.context, statements=self.statements
            )
        return self._collators[negatives]


def _has_id(record: Any) -> bool:
    return isinstance(record, Sample) or any(record.get(key) is not None for key in IDS)


def checked(bridge: ModelBridge, inputs: Mapping[str, Any], first: int = 0) -> dict[str, Any]:
    """The checked batch, with `sample_ids` as numbers.

    Args:
        first: samples without ids are numbered from here, by their index in the batches of all processes.

    Raises:
        ValueError: a key is missing or does not have one row per sample.
    """
    missing = [key for key in bridge.needs if inputs.get(key) is None]
    if missing:
        raise ValueError(
            f"the batch has no {', no '.join(missing)}; it has {', '.join(inputs) or 'nothing'}. {_advice(bridge)}"
        )
    found = dict(inputs)
    for key in bridge.needs:
        if not isinstance(found[key], Tensor) or not found[key].dim():
            raise ValueError(f"{key} of the batch is {_found(found[key])}; expected a tensor. {_advice(bridge)}")
    rows = len(found["labels"])
    found["sample_ids"] = _ids(found.get("sample_ids"), rows, first, found["labels"].device)
    for key, value in found.items():
        by_row = key in bridge.needs or key.startswith(OF_SAMPLES)
        if by_row and len(value) != rows:
            raise ValueError(f"{key} has {len(value)} rows and labels {rows}; expected one per sample{_cut(key)}")
        if key.startswith("negative_") and value.dim() != 3:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}; expected (N, K, M): K wrong answers of M tokens for each of "
                f"the {rows} samples{_cut(key)}"
            )
        if key == STATEMENT_IDS and (value.dim() != 4 or found[STATEMENT_ANSWERS].shape != value.shape[:3]):
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, {STATEMENT_ANSWERS} {tuple(found[STATEMENT_ANSWERS].shape)}; "
                "expected (N, S, K, L) and (N, S, K), as VQACollator makes them"
            )
    values, grid = found.get("pixel_values"), found.get("image_grid_thw")
    if values is not None and grid is not None and len(values) != int(grid.prod(-1).sum()):
        raise ValueError(
            f"pixel_values have {len(values)} patches, and image_grid_thw stands for {int(grid.prod(-1).sum())} of "
            f"{len(grid)} images; expected the same{_CUT}"
        )
    if values is not None and isinstance(bridge, DualBridge) and len(values) != rows:
        raise ValueError(f"pixel_values have {len(values)} rows and labels {rows}; expected one image per sample")
    return found


def rows_with_images(bridge: ModelBridge, inputs: Mapping[str, Any]) -> Tensor:
    """(N,) bool: the samples whose text has image tokens.

    Raises:
        ValueError: image tokens, and no `pixel_values`; or images whose sample has no image tokens.
    """
    labels, values = inputs["labels"], inputs.get("pixel_values")
    if "input_ids" not in bridge.needs:  # these families always look at an image
        there = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    else:
        there = (inputs["input_ids"] == bridge.model.config.image_token_id).any(1)
    unseen = ~there.any().expand(len(there)) if values is not None and len(values) else torch.zeros_like(there)
    if (
        values is not None
        and values.dim() == 5
        and len(values) == len(there)
        and "image_sizes" not in bridge.image_keys
    ):
        unseen = ~there & values.flatten(1).any(1)  # images by sample, with zeros where a sample has none
    if values is not None and unseen.any():
        row = int(unseen.nonzero()[0])
        raise ValueError(
            f"the batch has pixel_values of shape {tuple(values.shape)}, and sample {row} of it has no image token (id "
            f"{bridge.model.config.image_token_id}) to take an image; text and images come from one call of the "
            "model's own processor. Leave pixel_values out for samples without an image"
        )
    if there.any() and values is None:
        raise ValueError(
            f"the batch has no pixel_values, and {int(there.sum())} of its {len(there)} samples have an image; it has "
            f"{', '.join(inputs)}. {_advice(bridge)}"
        )
    return there


def without_images(images: BatchImages, inputs: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The texts of rows that have no images."""
    own = {k: inputs[k][rows] for k in ("sample_ids", WEIGHTS) if k in inputs}
    return {**images.bridge.select(images.bridge.inputs(inputs)[1], rows), **own}


def no_features(bridge: ModelBridge, text: Mapping[str, Tensor]) -> Tensor:
    """h_v of samples without an image, (N, 0, image_dim)."""
    ids = text["input_ids"]
    return torch.zeros(len(ids), 0, bridge.image_dim, device=ids.device, dtype=bridge.model.dtype)


def _ids(ids: Any, rows: int, first: int, device: torch.device) -> Tensor:
    if ids is None:
        return first + ranks.row_numbers(rows).to(device)
    if not isinstance(ids, Tensor):  # any hashable type
        ids = torch.tensor([numeric_id(i) for i in ids], device=device)
    if ids.shape != (rows,) or ids.is_floating_point():
        raise ValueError(
            f"sample_ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; expected one whole number, or anything "
            f"hashable, for each of the {rows} samples"
        )
    return ids


def _advice(bridge: ModelBridge) -> str:
    if isinstance(bridge, DualBridge):
        return (
            f"{type(bridge.model).__name__} learns from pixel_values, labels (N,), the index of each image's own text, "
            "and the texts: input_ids and attention_mask (K, L), or text_embeds"
        )
    return (
        f"{type(bridge.model).__name__} learns from pixel_values, {', '.join(bridge.needs)}; "
        "cmai_fast.data.VQACollator makes them from questions and answers"
    )


_CUT = (
    ". accelerate cuts every tensor to as many rows when it dispatches the batches of a stream; make tensors with a "
    "row per sample, or set accelerator_config={'dispatch_batches': False}"
)


def _cut(key: str) -> str:
    return _CUT if key.startswith(OF_SAMPLES) else ""


def _found(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value))}"
    return f"a {type(value).__name__}"
