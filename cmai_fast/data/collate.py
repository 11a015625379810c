"""From question-answer samples to the tensors an image-text model of `transformers` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# 5,000 pictures of 64 x 64 in float32 take 250 MB.
_CACHED_PIXELS, _CACHED_PICTURES = 64 * 64 * 3, 5_000


def format_prompt(processor: Any, question: str) -> str:
    """The chat prompt for one image and one question, up to where the model answers."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class VQACollator:
    """Collates samples (`image`, `question`, `answer`, optional `choices`, `sample_id`) into one batch.

    Args:
        processor: the model's own processor, with a chat template.
        negatives: how many wrong answers of the sample's `choices` to add for the contrastive loss; 0 adds none.
        max_length: the model's context in tokens; a longer sample raises a ValueError.
        seed: of the draw of wrong answers; a sample's draw depends on (seed, sample id) alone.

    A batch of N samples holds `input_ids`, `attention_mask`, `labels` (N, L; labels are -100 except on the response
    and its end token), `pixel_values` (N, 3, H, W), `sample_ids` (N,), and with negatives K > 0
    `negative_input_ids`, `negative_attention_mask`, `negative_labels` (N * K, M): the same prompts closed by wrong
    answers, row i * K + k belonging to sample i.
    """

    def __init__(self, processor: Any, negatives: int = 0, max_length: int | None = None, seed: int = 0) -> None:
        self.processor, self.negatives, self.max_length, self.seed = processor, negatives, max_length, seed
        self._pixels: dict[Any, torch.Tensor] = {}

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([self._encode_image(s["image"]) for s in samples])
        batch = self.responses(samples, [s["answer"] for s in samples])
        batch["pixel_values"] = pixel_values
        if all("sample_id" in s for s in samples):  # else the attack names samples by their places
            batch["sample_ids"] = torch.tensor([s["sample_id"] for s in samples])
        if self.negatives:
            rows = [s for s in samples for _ in range(self.negatives)]
            wrong = [answer for s in samples for answer in self._wrong_answers(s)]
            batch.update({f"negative_{k}": v for k, v in self.responses(rows, wrong).items()})
        return batch

    def responses(self, samples: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` (N, L) of the samples' questions closed by these answers."""
        return self._encode_text(self._prompts(samples), list(answers))

    def prompts(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` (N, L) up to where the model answers, for `generate`."""
        prompts = self.processor.tokenizer(
            self._prompts(samples), padding=True, padding_side="left", return_tensors="pt"
        )
        return {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}

    def _prompts(self, samples: Sequence[dict[str, Any]]) -> list[str]:
        """Chat prompts in which the image token stands as often as the image takes tokens."""
        pixel_values = self._encode_image(samples[0]["image"])[None]
        image_tokens = self.processor.replace_image_token({"pixel_values": pixel_values}, 0)
        prompts = [format_prompt(self.processor, s["question"]) for s in samples]
        return [p.replace(self.processor.image_token, image_tokens) for p in prompts]

    def _encode_image(self, image: Any) -> torch.Tensor:
        """Normalised pixels (3, H, W). Small pictures are kept: a data set asks several questions about each."""
        # Arrays only: the values of a PIL image are not all of it (a palette gives them their colours).
        small = isinstance(image, np.ndarray) and image.size <= _CACHED_PIXELS
        key = (image.dtype.str, image.shape, image.tobytes()) if small else None
        value = self._pixels.get(key)
        if value is None:
            value = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
            if key is not None and len(self._pixels) < _CACHED_PICTURES:
                self._pixels[key] = value
        return value

    def _wrong_answers(self, sample: dict[str, Any]) -> list[str]:
        others = [c for c in sample.get("choices", ()) if c != sample["answer"]]
        if not others:
            raise ValueError(
                f"sample {sample.get('sample_id')} has no wrong answers in its 'choices'; the contrastive loss needs "
                "at least one. Add them, or collate with negatives=0"
            )
        rng = np.random.default_rng((self.seed, int(sample.get("sample_id", 0))))
        return [others[j] for j in rng.integers(len(others), size=self.negatives)]

    def _encode_text(self, prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        prompt_ids = tokenizer(prompts, add_special_tokens=True)["input_ids"]
        answer_ids = tokenizer([" " + a for a in answers], add_special_tokens=False)["input_ids"]
        rows = [p + a + [tokenizer.eos_token_id] for p, a in zip(prompt_ids, answer_ids, strict=True)]
        longest = max(len(r) for r in rows)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a sample has {longest} tokens with its labels, the model's context is {self.max_length}; shorten the "
                "text or use a model with a longer context (nothing is truncated silently)"
            )
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        # Left padding: responses end at the same column, so logits are needed for a few columns only.
        for i, (row, prompt) in enumerate(zip(rows, prompt_ids, strict=True)):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
            response = row[len(prompt) :]
            labels[i, longest - len(response) :] = torch.tensor(response)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
