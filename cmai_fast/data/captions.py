"""The collator of encoder-decoders (ViT-GPT2, TrOCR), which describe an image and take no question."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cmai_fast.data.collate import answer_of, checked_samples, wrong_draws
from cmai_fast.data.control import ControlTokens, kept_apart
from cmai_fast.data.pictures import read_picture
from cmai_fast.data.prompt import check_text
from cmai_fast.data.sample import ASK_CAPTION, Sample, numeric_id
from cmai_fast.data.statements import Told, told


class CaptionCollator:
    """Collates samples of one picture and its caption each into a batch of a `VisionEncoderDecoderModel`.

    Args:
        processor: with an image processor and the decoder's tokenizer.
        negatives, seed, statements: as of `VQACollator`.
        max_length: the decoder's context in tokens; a longer caption raises a ValueError.

    A batch of N samples holds `labels` (N, L), the caption and the end token, then -100; `pixel_values` (N, 3, H, W);
    `sample_ids` (N,); with negatives K > 0 `negative_labels` (N, K, M); and what `statements` adds. Control tokens that
    a caption spells are read as text.

    Raises:
        ValueError: a tokenizer without an end token. When called: a sample with a question, or without exactly one
            picture; names the sample.
    """

    def __init__(
        self,
        processor: Any,
        negatives: int = 0,
        max_length: int | None = None,
        seed: int = 0,
        statements: Told | None = None,
    ) -> None:
        self.processor, self.negatives, self.max_length, self.seed = processor, negatives, max_length, seed
        self.statements, self._control = statements, ControlTokens(processor)
        self._end = processor.tokenizer.eos_token_id
        if self._end is None:
            raise ValueError(
                f"{type(processor.tokenizer).__name__} has no end token (eos_token), which captions end in"
            )

    def __call__(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        asked = checked_samples(samples)
        batch = {"labels": self._labels([(answer_of(s), f"{s.name}: its caption") for s in asked])}
        batch |= self.prompts(asked)
        batch["sample_ids"] = torch.tensor([numeric_id(s.id) for s in asked])
        if self.negatives:
            wrong = [
                (text, f"{s.name}: its choice") for s in asked for text in wrong_draws(s, self.negatives, self.seed)
            ]
            batch["negative_labels"] = self._labels(wrong).unflatten(0, (len(asked), self.negatives))
        if self.statements is not None:
            batch |= told(self.processor.tokenizer, asked, self.statements)
        return batch

    def with_pictures_by(self, image_processor: Any) -> CaptionCollator:
        """A copy that leaves the pictures to another image processor."""
        other = copy.copy(self)
        other.processor = copy.copy(self.processor)
        other.processor.image_processor = image_processor
        return other

    def prompts(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The pictures alone, for `generate`."""
        pictures = []
        for s in checked_samples(samples):
            if s.prompt not in ("", ASK_CAPTION):
                raise ValueError(
                    f"{s.name} asks {s.prompt!r:.80}, and the model takes no question, it describes images; use the "
                    "task captioning (--task captioning)"
                )
            if len(s.images) != 1:
                raise ValueError(f"{s.name} has {len(s.images)} images; an encoder-decoder takes exactly one")
            pictures.append(read_picture(s.images[0], f"{s.name}: its image"))
        return {"pixel_values": self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]}

    def _labels(self, texts: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Labels (n, L) of texts, each with its name in errors."""
        for text, name in texts:
            check_text(text, name)
        apart = [kept_apart(text) if self._control.find(text) else text for text, _ in texts]
        rows = self._control.tokenizer()(apart, add_special_tokens=False)
        labels = torch.full((len(texts), max(map(len, rows["input_ids"])) + 1), -100)
        for i, (ids, (_, name)) in enumerate(zip(rows["input_ids"], texts, strict=True)):
            if self.max_length is not None and len(ids) + 1 > self.max_length:
                raise ValueError(
                    f"{name} has {len(ids) + 1} tokens, the decoder's context is {self.max_length}; shorten the text "
                    "(nothing is truncated silently)"
                )
            labels[i, : len(ids) + 1] = torch.tensor([*ids, self._end])
        return labels
