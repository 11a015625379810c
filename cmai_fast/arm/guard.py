"""ARM in use: answer what looks consistent, withhold the answer to what does not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from cmai_fast.bridge import bridge_of, frozen
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.data import VQACollator
from cmai_fast.data.pictures import expected_size, read_picture


@dataclass(frozen=True)
class Decision:
    """What the guard made of one image and one question.

    Attributes:
        answer: the model's answer; None when it is rejected.
        score: S_c of the image and the question with the model's answer, in [-1, 1]. NaN (a broken model) is rejected.
        threshold: tau; rejected is what scores below it.
        route: "answer" or "reject".
        question: as asked.
        withheld_answer: what the model would have said, when it is rejected: for the person who reviews the case,
            never for the one who asked. None when it is answered.
    """

    answer: str | None
    score: float
    threshold: float
    route: Literal["answer", "reject"]
    question: str
    withheld_answer: str | None = None

    def to_json(self) -> str:
        """One line of JSON, with all attributes; a score that is not finite is null."""
        record = dataclasses.asdict(self) | {"score": self.score if math.isfinite(self.score) else None}
        return json.dumps(record, allow_nan=False)


class Guard:
    """Answers with a model, and scores every answer with its consistency heads.

    Args:
        model: an image-text model of `transformers`. It is used in evaluation mode and given back as it was.
        processor: its processor, one that `VQACollator` takes.
        heads: trained with this model.
        threshold: below which an answer is withheld: a `Threshold`, or a finite number.
        max_new_tokens: length of an answer at most.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        heads: ConsistencyHeads,
        threshold: Threshold | float,
        *,
        max_new_tokens: int = 16,
    ) -> None:
        self.threshold = threshold.tau if isinstance(threshold, Threshold) else float(threshold)
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {threshold}; expected a finite number, from cmcv.calibrate on clean inputs")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        self.model, self.processor, self.heads, self.max_new_tokens = model, processor, heads, max_new_tokens
        self.bridge, self.collate = bridge_of(model), VQACollator(processor)
        dims = {"image_dim": self.bridge.image_dim, "text_dim": self.bridge.text_dim}
        theirs = {name: heads.settings[name] for name in dims}
        if theirs != dims:
            raise ValueError(
                f"the heads were made for {theirs}, the model has {dims}; use those trained with this model"
            )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, threshold: float | None = None, max_new_tokens: int = 16, **how: Any
    ) -> Guard:
        """The guard of a model with `cmcv/` in its folder or beside it, of a run folder, a bundled name or a hub id.

        Args:
            folder: a `transformers` folder, a run folder (with `model/` and `cmcv/`), a bundled model's name, or an id
                of the Hugging Face hub.
            threshold: used in place of the saved one.
            how: for `cmai_fast.models.loading.load_model`: `device`, `dtype`, `attention`, and what the model's
                `from_pretrained` takes.

        Raises:
            ValueError: no such model, weights damaged or not safetensors, no heads, no threshold.
        """
        from cmai_fast.models.loading import find_heads, load_model

        place = find_heads(folder)
        if place is None:
            raise ValueError(
                f"no consistency heads for {folder}: there is no cmcv/ in its folder or beside it. Immunise it "
                "(cmai-fast immunize), which trains them, or copy their cmcv/ folder there"
            )
        heads, saved = ConsistencyHeads.from_pretrained(place)
        tau = saved if threshold is None else threshold
        if tau is None:
            raise ValueError(f"the heads of {folder} were saved without a threshold; calibrate them or pass threshold=")
        model, processor = load_model(folder, **how)
        return cls(model, processor, heads.to(model.device), tau, max_new_tokens=max_new_tokens)

    def decide(self, image: Any, question: str, *, resize: bool = False) -> Decision:
        """The decision for one image (path, PIL picture, uint8 or [0, 1] float array (H, W, 3)) and one question.

        Raises:
            ValueError: an image that cannot be read, has NaN or is of the wrong size (unless `resize`, which leaves it
                to the processor); a question that is empty, holds the image token or is too long.
        """
        return self.decide_batch([image], [question], resize=resize)[0]

    def decide_batch(self, images: Sequence[Any], questions: Sequence[str], *, resize: bool = False) -> list[Decision]:
        """As `decide`, for images and questions of the same number; each decision is the one it would get alone."""
        if isinstance(questions, str) or len(images) != len(questions):
            raise ValueError(f"{len(images)} images for questions {questions!r:.80}; expected one question an image")
        size = None if resize else expected_size(self.processor)
        pictures = [read_picture(image, f"image {i}") for i, image in enumerate(images)]
        for i, picture in enumerate(pictures):
            if size is not None and (picture.height, picture.width) != size:
                raise ValueError(
                    f"image {i} is {picture.height} x {picture.width} pixels; the model takes {size[0]} x {size[1]} "
                    "(height x width). Pass resize=True to let the processor resize it"
                )
        for i, question in enumerate(questions):
            self._check_question(question, f"question {i}")
        if not pictures:
            return []
        with frozen(self.model, self.heads), torch.no_grad():
            answers = self._answer(pictures, questions)
            scores = self._score(pictures, questions, answers)
        return [self._decide(*row) for row in zip(questions, answers, scores, strict=True)]

    def _decide(self, question: str, answer: str, score: float) -> Decision:
        if score >= self.threshold:  # false for NaN
            return Decision(answer, score, self.threshold, "answer", question)
        return Decision(None, score, self.threshold, "reject", question, withheld_answer=answer)

    def _check_question(self, question: Any, name: str) -> None:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{name} is {question!r}; expected a text that is not empty")
        token = getattr(self.processor, "image_token", None)
        if token and str(token) in question:
            raise ValueError(f"{name} holds {str(token)!r}, which stands for an image; ask without it")

    def _answer(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """Greedy answers to the collator's prompts."""
        rows = [{"image": p, "question": q} for p, q in zip(pictures, questions, strict=True)]
        inputs = self._on_device(self.collate.prompts(rows))
        lengths = inputs["attention_mask"].sum(1).tolist()
        for i, length in enumerate(lengths):
            if self.bridge.context is not None and length + self.max_new_tokens > self.bridge.context:
                raise ValueError(
                    f"question {i} makes a prompt of {length} tokens and the answer may take {self.max_new_tokens}; "
                    f"the model's context is {self.bridge.context}. Shorten the question or set max_new_tokens lower"
                )
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [a.strip() for a in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _score(self, pictures: Sequence[Image.Image], questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """S_c of each image with its question and answer, laid out as in training (one collator for both)."""
        rows = zip(pictures, questions, answers, strict=True)
        batch = self._on_device(self.collate([{"image": p, "question": q, "answer": a} for p, q, a in rows]))
        image_inputs, text = self.bridge.inputs(batch)
        image = self.bridge.encode_image(batch["pixel_values"], **image_inputs)
        projected = self.heads.project_image(image, self.bridge.image_tokens(text))
        return self.heads.score(projected, self.heads.project_text(self.bridge.encode_text(**text))).tolist()

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        return {**batch, "pixel_values": batch["pixel_values"].to(self.model.dtype)}
