"""The collator: question-answer samples to the tensors that an image-text model of `transformers` takes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from cmai_fast.data.pictures import read_picture
from cmai_fast.data.prompt import PromptForm, check_text
from cmai_fast.data.remembered import RememberedPictures
from cmai_fast.data.sample import Sample, numeric_id
from cmai_fast.data.statements import Told, told
from cmai_fast.data.user_tokens import UserTokens, user_tokens

_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_NEGATIVE = ("input_ids", "attention_mask", "labels")
Row = dict[str, np.ndarray]


class VQACollator:
    """Collates samples (or records, as `Sample.of` takes them) into one batch.

    Pictures are read by `read_picture`. Text and pictures are prepared by the processor's own call; docs/families.md
    lists the tested families. Prompts are formatted by `format_prompt`.

    Args:
        processor: the model's own processor, which is not changed.
        negatives: how many wrong answers of the sample's `choices` to add for the contrastive loss; 0 adds none.
        max_length: the model's context in tokens; a longer sample raises a ValueError.
        seed: for drawing wrong answers; the draw of a sample depends only on (seed, sample id).
        statements: gives what is said of a sample's picture, for a verifier's training (`cmcv.statements.Statements`).
        control_tokens: how the tokenizer's control tokens (`</s>`, `<image>`) in a question, an answer or a choice are
            treated: "text" reads them as text, "refuse" raises a ValueError.

    A batch of N samples holds `input_ids`, `attention_mask`, `labels` (N, L; padded on the left, labels are -100 except
    on the response and its end token), `sample_ids` (N,), and the family's other inputs: `pixel_values` (for LLaVA
    (images, 3, H, W)), `image_sizes`, `image_grid_thw`, `token_type_ids`, ... Samples may have several images or
    none if the family supports it; a batch without any image has no `pixel_values`. With negatives K > 0 it holds
    `negative_input_ids`, `negative_attention_mask`, `negative_labels` (N, K, M): the same prompts, each followed by K
    wrong answers. `negative_texts` flattens them. With `statements` it holds `statement_ids` and `statement_answers`
    (`data.statements.stacked`).

    Raises:
        ValueError: a processor without a chat template or a known prompt form, or with an unusable template. When
            called: a sample that cannot be collated; names its id and key.
    """

    def __init__(
        self,
        processor: Any,
        negatives: int = 0,
        max_length: int | None = None,
        seed: int = 0,
        control_tokens: Literal["text", "refuse"] = "text",
        statements: Told | None = None,
    ) -> None:
        self.processor, self.negatives, self.max_length, self.seed = processor, negatives, max_length, seed
        self.statements = statements
        self._form = PromptForm(processor, control_tokens)
        self._call = copy.copy(processor)
        self._call.image_processor = RememberedPictures(processor.image_processor)
        self._form.control.into(self._call)

    def __call__(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        asked = checked_samples(samples)
        texts, rows, images = self._encode(asked)
        closed = self._close(texts, rows, [(answer_of(s), f"{_name(s)}: its answer") for s in asked])
        # Texts first: accelerate takes the rows of the first tensor for the number of samples, and images may be fewer.
        batch = {**closed, **images}
        batch["sample_ids"] = torch.tensor([numeric_id(s.id) for s in asked])
        if self.negatives:
            wrong = [
                (answer, f"{_name(s)}: its choice")
                for s in asked
                for answer in wrong_draws(s, self.negatives, self.seed)
            ]
            places = [i for i in range(len(samples)) for _ in range(self.negatives)]
            closed = self._close([texts[i] for i in places], [rows[i] for i in places], wrong)
            by_sample = (len(asked), self.negatives)  # slicing a batch by sample keeps them with their samples
            batch.update({f"negative_{k}": closed[k].unflatten(0, by_sample) for k in _NEGATIVE})
        if self.statements is not None:
            batch.update(told(self.processor.tokenizer, asked, self.statements))
        return batch

    def with_pictures_by(self, image_processor: Any) -> VQACollator:
        """A copy that leaves the pictures to another image processor."""
        other = copy.copy(self)
        other.processor, other._call = copy.copy(self.processor), copy.copy(self._call)
        other.processor.image_processor = image_processor
        other._call.image_processor = RememberedPictures(image_processor)
        return other

    def prompts(self, samples: Sequence[Sample | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch with prompts only, without labels, for `generate`."""
        _, rows, batch = self._encode(checked_samples(samples))
        return {**self._padded(rows), **batch}

    def user_tokens(self, samples: Sequence[Sample]) -> list[UserTokens]:
        """Where the prompt of each sample, the user's own text, lies among the tokens of `prompts`."""
        return [user_tokens(self._form, s.prompt, len(s.images)) for s in samples]

    def read(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of whole prompts, template included, as `UserTokens.whole`."""
        return self._form.control.tokenizer()(list(prompts), add_special_tokens=self._form.add_special_tokens)[
            "input_ids"
        ]

    def _encode(self, samples: Sequence[Sample]) -> tuple[list[str], list[Row], dict[str, torch.Tensor]]:
        """Prompts as texts and as tokens, and the other inputs of the family's forward."""
        texts = []
        for s in samples:
            if s.prompt is not None and not str(s.prompt).strip():
                raise ValueError(
                    f"{s.name} has no question, which this model answers; for captions there is the task captioning "
                    "(--task captioning)"
                )
            try:
                texts.append(self._form.prompt(s.prompt, len(s.images), "its question"))
            except ValueError as error:
                raise ValueError(f"{s.name}: {error}") from error  # with file and line, for a sample of two images
        pictures = [
            [read_picture(p, f"{_name(s)}: its image" + f" {k}" * (len(s.images) > 1)) for k, p in enumerate(s.images)]
            for s in samples
        ]
        made = self._call(
            images=pictures if any(pictures) else None,  # some families need them grouped by sample
            text=list(texts),
            padding=True,  # PaliGemma's processor needs it; it is removed below
            padding_side="right",  # InstructBLIP counts positions of its second text from the first column
            add_special_tokens=self._form.add_special_tokens,
        )
        tokens = {k: np.array(made.pop(k)) for k in _BY_TOKEN if k in made}
        real = tokens["attention_mask"].astype(bool)
        rows = [{k: v[i, own] for k, v in tokens.items()} for i, own in enumerate(real)]
        made.pop("labels", None)  # PaliGemma's own, of prompts without responses
        return texts, rows, {k: torch.as_tensor(v) for k, v in made.items()}

    def _close(
        self, texts: Sequence[str], rows: Sequence[Row], answers: Sequence[tuple[str, str]]
    ) -> dict[str, torch.Tensor]:
        """Prompts followed by these answers; each answer comes with its name in errors."""
        closed, kind = [], {"attention_mask": 1, "token_type_ids": int(self._form.takes_suffix)}
        closings = [self._form.closing(answer, name) for answer, name in answers]
        for row, response in zip(rows, self._form.responses(texts, closings), strict=True):
            more = {k: np.full(len(response), kind.get(k, 0)) for k in row} | {"input_ids": np.array(response)}
            labels = np.concatenate([np.full(len(row["input_ids"]), -100), response])
            closed.append({"labels": labels} | {k: np.concatenate([v, more[k]]) for k, v in row.items()})
        for row, (_, name) in zip(closed, answers, strict=True):
            if self.max_length is not None and len(row["labels"]) > self.max_length:
                raise ValueError(
                    f"{name.partition(':')[0]} has {len(row['labels'])} tokens with its labels, the model's context is "
                    f"{self.max_length}; shorten the text or use a model with a longer context (nothing is truncated "
                    "silently)"
                )
        return self._padded(closed)

    def _padded(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        # Left padding: all responses end in the last column, so logits are needed for a few columns only.
        filling = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {k: torch.full((len(rows), longest), filling.get(k, 0)) for k in rows[0]}
        for i, row in enumerate(rows):
            for k, v in row.items():
                padded[k][i, longest - len(v) :] = torch.from_numpy(v)
        return padded


def negative_texts(batch: Mapping[str, torch.Tensor], keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """The batch's `negative_KEY` (N, K, M) for each of `keys`, as (N * K, M): row i * K + k belongs to sample i.

    Raises:
        ValueError: another shape, from which it is unknown to which samples they belong.
    """
    found = {}
    for key in keys:
        value = batch.get(f"negative_{key}")
        if value is None:
            continue
        count = len(batch["labels"])
        if value.dim() != 3 or len(value) != count:
            raise ValueError(
                f"the batch has negative_{key} of shape {tuple(value.shape)} for {count} samples; expected "
                f"({count}, K, M): K wrong answers per sample, as VQACollator makes them"
            )
        found[key] = value.flatten(0, 1)
    return found


def wrong_draws(sample: Sample, count: int, seed: int) -> list[str]:
    """`count` wrong answers of the sample's `choices`, drawn; the draw depends only on (seed, sample id).

    Raises:
        ValueError: there is none.
    """
    for choice in sample.choices:
        check_text(choice, f"{_name(sample)}: its choice")
    others = sample.wrong_choices
    if not others:
        raise ValueError(
            f"{_name(sample)} has no wrong answers in its 'choices'; the contrastive loss needs at least one. Add "
            "them, or collate with negatives=0"
        )
    rng = np.random.default_rng((seed, numeric_id(sample.id) % 2**64))
    return [others[j] for j in rng.integers(len(others), size=count)]


def _name(sample: Sample) -> str:
    return f"sample {sample.id!r}"


def checked_samples(samples: Sequence[Sample | Mapping[str, Any]]) -> list[Sample]:
    """The samples of a batch.

    Raises:
        ValueError: no list of at least one sample, an id that is no text or number, images that are no tuple.
    """
    if isinstance(samples, (Sample, Mapping, str)) or not len(samples):
        raise ValueError(f"the batch is {samples!r:.80}; expected a list of at least one sample")
    checked = [Sample.of(s, i) for i, s in enumerate(samples)]
    for i, sample in enumerate(checked):
        try:
            hash(sample.id)
        except TypeError:
            raise ValueError(f"sample {i} has the id {sample.id!r:.80}; expected a text or a number") from None
        if not isinstance(sample.images, (list, tuple)):
            raise ValueError(
                f"{_name(sample)} has a {type(sample.images).__name__} as images; expected a tuple, also for one image"
            )
    return checked


def answer_of(sample: Sample) -> str:
    """The first reference, as it is.

    Raises:
        ValueError: there is none.
    """
    if not sample.references or sample.references[0] is None:
        raise ValueError(f"{_name(sample)} has no answer; expected at least one right answer, as a text")
    return sample.references[0]
