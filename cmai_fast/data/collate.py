"""From question-answer samples to the tensors an image-text model of `transformers` takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cmai_fast.data.pictures import RememberedPictures
from cmai_fast.data.prompt import PromptForm, format_prompt
from cmai_fast.data.sample import Sample, numeric_id

_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
Row = dict[str, np.ndarray]


class VQACollator:
    """Collates samples (`image`, `question`, `answer`, optional `choices`, `sample_id`) into one batch.

    Text and images are prepared by the processor's own call, whatever its family; docs/families.md says which are
    tested. The prompt is that of `format_prompt`.

    Args:
        processor: the model's own processor. It is not changed.
        negatives: how many wrong answers of the sample's `choices` to add for the contrastive loss; 0 adds none.
        max_length: the model's context in tokens; a longer sample raises a ValueError.
        seed: of the draw of wrong answers; a sample's draw depends on (seed, sample id) alone.

    A batch of N samples holds `input_ids`, `attention_mask`, `labels` (N, L; padded on the left, labels are -100 except
    on the response and its end token), `sample_ids` (N,), and what else the family's forward takes: `pixel_values`, for
    LLaVA (N, 3, H, W), `image_sizes`, `image_grid_thw`, `token_type_ids`, ... With negatives K > 0 it holds
    `negative_input_ids`, `negative_attention_mask`, `negative_labels` (N, K, M): the same prompts closed by wrong
    answers.

    Raises:
        ValueError: a processor without chat template and known form of a prompt, or whose template does not fit.
    """

    def __init__(self, processor: Any, negatives: int = 0, max_length: int | None = None, seed: int = 0) -> None:
        self.processor, self.negatives, self.max_length, self.seed = processor, negatives, max_length, seed
        self._form = PromptForm(processor)
        self._call = copy.copy(processor)
        self._call.image_processor = RememberedPictures(processor.image_processor)

    def __call__(self, samples: Sequence[Sample | dict[str, Any]]) -> dict[str, torch.Tensor]:
        asked = [Sample.of(s, i) for i, s in enumerate(samples)]
        texts, rows, batch = self._encode(asked)
        batch.update(self._close(texts, rows, [s.answer for s in asked]))
        batch["sample_ids"] = torch.tensor([numeric_id(s.id) for s in asked])
        if self.negatives:
            wrong = [answer for s in asked for answer in self._wrong_answers(s)]
            places = [i for i in range(len(samples)) for _ in range(self.negatives)]
            closed = self._close([texts[i] for i in places], [rows[i] for i in places], wrong)
            shape = (len(asked), self.negatives)
            batch.update(
                {f"negative_{k}": closed[k].unflatten(0, shape) for k in ("input_ids", "attention_mask", "labels")}
            )
        return batch

    def prompts(self, samples: Sequence[Sample | dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch up to where the model answers, without labels, for `generate`."""
        _, rows, batch = self._encode([Sample.of(s, i) for i, s in enumerate(samples)])
        return {**batch, **self._padded(rows)}

    def _encode(self, samples: Sequence[Sample]) -> tuple[list[str], list[Row], dict[str, torch.Tensor]]:
        """Prompts as texts and as tokens, and what the family's forward takes beside the tokens."""
        texts = [format_prompt(self.processor, s.prompt) for s in samples]
        made = self._call(
            images=[list(s.images) for s in samples],  # some families want them by sample
            text=list(texts),
            padding=True,  # PaliGemma's processor cannot do without; it is taken off again
            padding_side="right",  # positions of InstructBLIP's second text are counted from its first column
            add_special_tokens=self._form.add_special_tokens,
        )
        tokens = {k: np.array(made.pop(k)) for k in _BY_TOKEN if k in made}
        real = tokens["attention_mask"].astype(bool)
        rows = [{k: v[i, own] for k, v in tokens.items()} for i, own in enumerate(real)]
        made.pop("labels", None)  # PaliGemma's own, of prompts without responses
        return texts, rows, {k: torch.as_tensor(v) for k, v in made.items()}

    def _close(self, texts: Sequence[str], rows: Sequence[Row], answers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Prompts closed by these answers."""
        closed, kind = [], {"attention_mask": 1, "token_type_ids": int(self._form.takes_suffix)}
        for row, response in zip(rows, self._form.responses(texts, answers), strict=True):
            more = {k: np.full(len(response), kind.get(k, 0)) for k in row} | {"input_ids": np.array(response)}
            labels = np.concatenate([np.full(len(row["input_ids"]), -100), response])
            closed.append({"labels": labels} | {k: np.concatenate([v, more[k]]) for k, v in row.items()})
        longest = max(len(row["labels"]) for row in closed)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a sample has {longest} tokens with its labels, the model's context is {self.max_length}; shorten the "
                "text or use a model with a longer context (nothing is truncated silently)"
            )
        return self._padded(closed)

    def _padded(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        # Left padding: responses end at the same column, so logits are needed for a few columns only.
        filling = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {k: torch.full((len(rows), longest), filling.get(k, 0)) for k in rows[0]}
        for i, row in enumerate(rows):
            for k, v in row.items():
                padded[k][i, longest - len(v) :] = torch.from_numpy(v)
        return padded

    def _wrong_answers(self, sample: Sample) -> list[str]:
        others = [c for c in sample.choices if c != sample.answer]
        if not others:
            raise ValueError(
                f"sample {sample.id} has no wrong answers in its 'choices'; the contrastive loss needs "
                "at least one. Add them, or collate with negatives=0"
            )
        rng = np.random.default_rng((self.seed, numeric_id(sample.id)))
        return [others[j] for j in rng.integers(len(others), size=self.negatives)]
