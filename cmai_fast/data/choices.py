"""The collator of dual encoders (CLIP, SigLIP), which choose the text of a picture among several."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from cmai_fast.data.pictures import read_picture
from cmai_fast.data.sample import Sample, numeric_id
from cmai_fast.metrics.exact_match import folded


def choices_of(samples: Sequence[Sample], every: bool = False) -> tuple[str, ...]:
    """The distinct texts to choose from: the choices of all samples, or the answer of a sample without choices.

    Class names are choices. A caption is the answer of its picture, and all captions are the texts to choose from; with
    `every` also those beside the first of a picture.
    """
    own = lambda s: (s.references or (s.answer,)) if every else (s.answer,)  # noqa: E731  # s.answer raises
    return tuple(dict.fromkeys(text for s in samples for text in (s.choices or own(s))))


def places_of(texts: Sequence[str]) -> dict[str, list[int]]:
    """Where each text is among `texts`, by what it says: case, extra spaces and the mark at the end do not count."""
    places: dict[str, list[int]] = {}
    for k, text in enumerate(texts):
        places.setdefault(folded(text), []).append(k)
    return places


class ChoiceCollator:
    """Collates samples of one picture each into a batch of a dual encoder.

    Args:
        processor: the model's own processor.
        texts: the K texts to choose from, the same for every batch; None: the answers of the batch, as dual encoders
            are trained on captions.

    A batch of N samples holds `pixel_values` (N, 3, H, W), the texts as `input_ids` and, where the family has it,
    `attention_mask` (K, L), `labels` (N,), the index of each sample's answer among them (or of another of its
    references), and `sample_ids` (N,). If `texts` holds several references of a sample, `relevant` (N, K) marks them.

    Raises:
        ValueError: a sample without exactly one picture, or whose answer is not among the texts; names the sample.
    """

    def __init__(self, processor: Any, texts: Sequence[str] | None = None) -> None:
        self.processor = processor
        self.texts = None if texts is None else tuple(texts)
        # SigLIP was trained on texts of full length, padding included, and has no attention mask.
        fixed = "attention_mask" not in getattr(processor.tokenizer, "model_input_names", ("attention_mask",))
        self._padding = "max_length" if fixed else True
        self._tokens = None if self.texts is None else self.read(self.texts)

    def __call__(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        asked = [Sample.of(s, i) for i, s in enumerate(samples)]
        texts = self.texts if self.texts is not None else choices_of(asked)
        places = places_of(texts)
        pictures, labels, relevant = [], [], torch.zeros(len(asked), len(texts), dtype=torch.bool)
        for i, s in enumerate(asked):
            if len(s.images) != 1:
                raise ValueError(f"{s.name} has {len(s.images)} images; a dual encoder takes exactly one")
            known = [place for r in s.references for place in places.get(folded(r), ())]
            if not known:
                raise ValueError(
                    f"the answer {s.answer!r} of sample {s.id!r} is not among the {len(texts)} texts to choose from; "
                    "add it to the choices"
                )
            labels.append(texts.index(s.answer) if s.answer in texts else known[0])
            relevant[i, [*known, labels[-1]]] = True
            pictures.append(read_picture(s.images[0], f"the image of sample {s.id!r}"))
        return {
            **dict(self.processor.image_processor(images=pictures, return_tensors="pt")),
            **(self._tokens if self._tokens is not None else self.read(texts)),
            "labels": torch.tensor(labels),
            **({"relevant": relevant} if self.texts is not None and bool((relevant.sum(1) > 1).any()) else {}),
            "sample_ids": torch.tensor([numeric_id(s.id) for s in asked]),
        }

    def with_pictures_by(self, image_processor: Any) -> ChoiceCollator:
        """A copy that leaves the pictures to another image processor."""
        other = copy.copy(self)
        other.processor = copy.copy(self.processor)
        other.processor.image_processor = image_processor
        return other

    def read(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Texts as the text side takes them: `input_ids` (K, L) and, where the family has it, `attention_mask`."""
        made = self.processor.tokenizer(list(texts), padding=self._padding, truncation=True, return_tensors="pt")
        return {k: made[k] for k in ("input_ids", "attention_mask") if k in made}
