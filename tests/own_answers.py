"""Batches whose labels are what a model itself answers, so that a random model starts out right on every sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmai_fast.attacks import Victim
from cmai_fast.bridge import Bridge
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.data.sample import numeric_id
from cmai_fast.pixels import PixelSpace


def pad_left(rows: list[list[int]], answers: list[int], pad: int, extra: int = 0) -> dict[str, Tensor]:
    """Token rows of which the last `answers[i]` are the response, as a batch with `extra` more columns of padding."""
    length = max(map(len, rows)) + extra
    ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, n) in enumerate(zip(rows, answers, strict=True)):
        ids[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
        labels[i, length - n :] = torch.tensor(row[-n:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Case:
    """easy-VQA pictures `clean` (N, 3, 64, 64) in [0, 1] and token rows that end in the model's own greedy answer."""

    model: Any
    space: PixelSpace
    clean: Tensor
    rows: list[list[int]]
    answers: list[int]
    pad: int
    sample_ids: Tensor

    def batch(self, rows: list[int] | None = None, extra: int = 0) -> dict[str, Tensor]:
        """Of these rows alone, padded to the longest of them (and `extra`)."""
        chosen = list(range(len(self.rows))) if rows is None else rows
        return pad_left([self.rows[i] for i in chosen], [self.answers[i] for i in chosen], self.pad, extra)

    def victim(self, rows: list[int] | None = None, **settings: Any) -> Victim:
        return Victim(Bridge(self.model), self.space, self.batch(rows), **settings)


def answer_itself(tiny: tuple[Any, Any], samples: int, dtype: torch.dtype = torch.float32) -> Case:
    """Responses of one and two tokens in turn, found by plain forward passes of one sample each."""
    model, processor = tiny[0].to(dtype), tiny[1]
    data = load_dataset("easyvqa", "test", limit=samples, seed=0)
    collate = VQACollator(processor)
    space = PixelSpace.from_processor(processor)
    rows, answers = [], [1 + i % 2 for i in range(samples)]
    clean = space.to_pixels(collate([data[i] for i in range(samples)])["pixel_values"]).to(dtype)
    for i in range(samples):
        row = collate.prompts([data[i]])["input_ids"][0].tolist()
        for _ in range(answers[i]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row]), pixel_values=space.to_model(clean[i : i + 1])).logits
            row.append(int(logits[0, -1].argmax()))
        rows.append(row)
    ids = torch.tensor([numeric_id(data[i].id) for i in range(samples)])
    return Case(model, space, clean, rows, answers, processor.tokenizer.pad_token_id, ids)
