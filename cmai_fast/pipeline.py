"""A model with its processor, bridge, pixel space, collator, heads, threshold and generation settings.

Training, evaluation and guard use the same prompts, generation settings and S_c, because all use this class.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmai_fast.bridge import BatchImages, DualBridge, bridge_of, frozen
from cmai_fast.bridge.encoded_once import images_encoded_once
from cmai_fast.cmcv import ConsistencyHeads, Threshold
from cmai_fast.cmcv.fingerprint import changed, fingerprint
from cmai_fast.cmcv.heads import RECORD as HEADS
from cmai_fast.cmcv.verifier import RECORD as VERIFIER
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import Sample
from cmai_fast.data.choices import ChoiceCollator, choices_of
from cmai_fast.data.collators import Collator, collator_of
from cmai_fast.generation import Generation, own_settings
from cmai_fast.pixels import PixelSpace

__all__ = ["Generation", "Pipeline", "alone", "in_parts", "out_of_memory"]

T = TypeVar("T")
_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


class Pipeline:
    """A model that answers questions about images. Threads may share it; they take turns.

    Args:
        name: its name in errors and progress.
        model: an image-text model of `transformers`. It is used in evaluation mode and restored afterwards.
        processor: its processor, one that `collator_of` takes.
        heads: trained with this model; S_c is their score.
        threshold: of the score.
        generation: None: that of the threshold's calibration, else 16 tokens.
        verifier: made for this model; with one, the score of an answer is its margin instead of S_c.

    Raises:
        ValueError: a model that cannot be bridged, a processor that the collator refuses, heads of another model's
            width, or a threshold that was calibrated with other generation settings.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        heads: ConsistencyHeads | None = None,
        threshold: Threshold | None = None,
        generation: Generation | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self.verifier = verifier
        self.name, self.model, self.processor, self.heads, self.threshold = name, model, processor, heads, threshold
        self.bridge = bridge_of(model)
        calibrated = threshold.generation if threshold is not None else None
        self.generation = generation or calibrated or Generation()
        if calibrated is not None and calibrated != self.generation:
            raise ValueError(
                f"max_new_tokens is {self.generation.max_new_tokens}, and the threshold of {name} was calibrated on "
                f"answers of at most {calibrated.max_new_tokens} tokens; leave max_new_tokens out, or calibrate again "
                "(cmai-fast calibrate)"
            )
        saved = threshold.fingerprint if threshold is not None else None
        if saved is not None and (wrong := changed(saved, self.fingerprint())):
            raise ValueError(
                f"the threshold of {name} was set with other {' and another '.join(wrong)} than this model has; "
                "calibrate it for this model (cmai-fast calibrate)"
            )
        self.space = PixelSpace.from_processor(processor)
        self.collate: Collator = collator_of(self.bridge, processor)
        if heads is not None:
            dims = {"image_dim": self.bridge.image_dim, "text_dim": self.bridge.text_dim}
            theirs = {name: heads.settings[name] for name in dims}
            if theirs != dims:
                raise ValueError(
                    f"the heads were made for {theirs}, the model has {dims}; use those trained with this model"
                )

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        heads: str | Path | None = None,
        generation: Generation | None = None,
        calibrated: bool = True,
        **how: Any,
    ) -> Pipeline:
        """By name, folder, run or hub id, as `cmai_fast.models.loading.load_model`.

        Args:
            heads: a folder of heads or a verifier; None: `cmcv/` in the model's folder or beside it, if there is one.
            generation: see the class.
            calibrated: False leaves the saved threshold out; answers are generated as it was calibrated, unless
                `generation` says otherwise.
            how: `device`, `dtype`, `attention` and other arguments of `load_model`.
        """
        from cmai_fast.models.loading import find_heads, load_model

        place = find_heads(name) if heads is None else Path(heads)
        if place is not None:
            check_scoring(place)  # before the model, which takes longer
        model, processor = load_model(name, **how)
        found, verifier, saved = (None, None, None) if place is None else scoring(place, model, processor)
        if saved is not None and not calibrated:
            generation, saved = generation or saved.generation, None
        return cls(str(name), model, processor, found, saved, generation, verifier)

    def fingerprint(self) -> dict[str, str]:
        """Of the model and its processor, for a threshold."""
        return fingerprint(self.model, self.processor)

    @property
    def scores(self) -> bool:
        """Whether answers can be scored."""
        return self.heads is not None or self.verifier is not None

    @property
    def guarded(self) -> bool:
        """Whether there is a score and a threshold, so that a guard can be made of it."""
        return self.scores and self.threshold is not None

    @property
    def chooses(self) -> bool:
        """Whether the model is a dual encoder, which takes no question and chooses its answer among texts."""
        return isinstance(self.collate, ChoiceCollator)

    def choose_from(self, samples: Sequence[Sample]) -> None:
        """Sets the texts from which a dual encoder chooses its answers to those of these samples (`choices_of`).

        Has no effect on a model that generates its answers.
        """
        if isinstance(self.collate, ChoiceCollator):
            self.collate = ChoiceCollator(self.processor, choices_of(samples, every=True))

    def images(self, samples: Sequence[Sample]) -> BatchImages:
        """The images of these samples, one batch, on the model's device."""
        return BatchImages(self.bridge, self.space, self.on_device(self.collate(samples)))

    def generate(self, samples: Sequence[Sample], images: Sequence[Tensor] | None = None) -> list[str]:
        """Greedy answers, one per sample; for a dual encoder, the text nearest to the image (`choose_from`).

        Args:
            images: instead of the samples' own, one tensor in [0, 1] per sample, as `BatchImages.split` returns them.
        """
        if not samples:
            return []
        if isinstance(self.collate, ChoiceCollator):
            nearest = self.similarities(samples, images).argmax(-1).tolist()
            return [self.collate.texts[i] for i in nearest]  # type: ignore[index]  # similarities needs them
        with self._in_use():
            return self._say(samples, self._prompts(samples, images))

    def similarities(self, samples: Sequence[Sample], images: Sequence[Tensor] | None = None) -> Tensor:
        """Of a dual encoder: the logits (N, K) of each image with the texts to choose from (`choose_from`).

        `images`: as for `generate`.

        Raises:
            ValueError: the model generates its answers, or there are no texts.
        """
        texts = getattr(self.collate, "texts", None)
        if not self.chooses or texts is None:
            raise ValueError(
                f"{self.name} has no texts to choose from; give records with choices (guard --data), or call "
                "choose_from(samples)"
            )
        with self._in_use():
            # Any text will do: labels do not affect the choice.
            batch = self._closed(samples, [texts[0]] * len(samples))
            if images is not None:
                batch = self._with(images, batch, batch)
            _, text = self.bridge.inputs(batch)
            features = self.bridge.encode_image(batch["pixel_values"].to(self.model.dtype))
            return self.bridge.fuse(features, **text)[0].squeeze(1)

    def score(
        self, samples: Sequence[Sample], answers: Sequence[str], images: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The score (N,) of each image with its prompt and this answer: the verifier's margin, or S_c without one.

        `images`: as for `generate`.

        Raises:
            ValueError: there are neither heads nor a verifier, or a sample has no image.
        """
        if not self.scores:
            raise ValueError(f"{self.name} has no consistency heads; train them (cmai-fast calibrate)")
        if not samples:
            return torch.zeros(0)
        _check_images(samples)
        with self._in_use():
            if self.verifier is not None:
                return self._verify(samples, answers, self._prompts(samples, images))
            assert self.heads is not None
            batch = self._closed(samples, answers)
            if images is not None:
                batch = self._with(images, batch, batch)
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
            image_inputs, text = self.bridge.inputs(batch)
            image = self.bridge.encode_image(batch["pixel_values"], **image_inputs)
            projected = self.heads.project_image(image, self.bridge.image_tokens(text))
            return self.heads.score(projected, self.heads.project_text(self.bridge.encode_text(**text)))

    def answer(
        self, samples: Sequence[Sample], images: Sequence[Tensor] | None = None
    ) -> tuple[list[str], list[float]]:
        """Greedy answers and the score of each; images are encoded once for both if the model's family allows it.

        Samples that do not fit into memory at once are answered in halves.
        """

        def part(rows: slice) -> list[tuple[str, float]]:
            own = None if images is None else images[rows]
            with self._in_use(), images_encoded_once(self.model):
                if self.verifier is not None:
                    _check_images(samples[rows])
                    prompts = self._prompts(samples[rows], own)
                    said = self._say(samples[rows], prompts)
                    return list(zip(said, self._verify(samples[rows], said, prompts).tolist(), strict=True))
                said = self.generate(samples[rows], own)
                return list(zip(said, self.score(samples[rows], said, own).tolist(), strict=True))

        rows = in_parts(len(samples), part)
        return [answer for answer, _ in rows], [score for _, score in rows]

    def _prompts(self, samples: Sequence[Sample], images: Sequence[Tensor] | None) -> dict[str, Tensor]:
        prompts = self.on_device(self.collate.prompts(samples))  # type: ignore[union-attr]  # a model that generates
        if images is not None:
            prompts = self._with(images, self._closed(samples, [""] * len(samples)), prompts)
        if "pixel_values" in prompts:
            prompts["pixel_values"] = prompts["pixel_values"].to(self.model.dtype)
        return prompts

    def _say(self, samples: Sequence[Sample], prompts: Mapping[str, Tensor]) -> list[str]:
        if "attention_mask" in prompts:
            self._check_context(samples, prompts["attention_mask"])
        elif self.bridge.context is not None and self.generation.max_new_tokens > self.bridge.context:
            raise ValueError(
                f"max_new_tokens is {self.generation.max_new_tokens}, and the decoder's context is "
                f"{self.bridge.context}; set it lower"
            )
        with own_settings(self.model):
            output = self.model.generate(**prompts, generation_config=self.generation.config())
        new = output if self.model.config.is_encoder_decoder else output[:, prompts["input_ids"].shape[1] :]
        return [a.strip() for a in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _verify(self, samples: Sequence[Sample], answers: Sequence[str], prompts: Mapping[str, Tensor]) -> Tensor:
        assert self.verifier is not None
        asked = [Sample.of(s, i) for i, s in enumerate(samples)]
        texts = self.verifier.texts([s.prompt for s in asked], answers, [s.choices for s in asked])
        image_inputs, text = self.bridge.inputs(prompts)
        features = self.verifier.bridge.encode_image(prompts["pixel_values"], **image_inputs)
        return self.verifier.margin(features, texts, self.verifier.bridge.image_tokens(text))

    def with_texts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of a dual encoder with its texts encoded, without gradients; any other batch as it is."""
        if not isinstance(self.bridge, DualBridge):
            return batch
        with self._in_use():
            texts = self.bridge.encode_texts(batch["input_ids"], batch.get("attention_mask"))
        return {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")} | {"text_embeds": texts}

    def on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.model.device) for k, v in batch.items()}

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Inside, only this thread uses model and tokenizer; the model is in evaluation mode, without gradients.

        The heads have no mode, and nothing is differentiated, so they need no restoring.
        """
        with alone(self.model, self.processor.tokenizer), frozen(self.model), torch.no_grad():
            yield

    def _closed(self, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Tensor]:
        rows = [replace(Sample.of(s), references=(a,)) for s, a in zip(samples, answers, strict=True)]
        return self.on_device(self.collate(rows))

    def _with(
        self, images: Sequence[Tensor], batch: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`inputs` with these images instead of the batch's own."""
        own = BatchImages(self.bridge, self.space, batch)
        return {**inputs, "pixel_values": own.inputs(own.join(images))["pixel_values"]}

    def _check_context(self, samples: Sequence[Sample], mask: Tensor) -> None:
        if self.bridge.context is None:
            return
        for i, length in enumerate(mask.sum(1).tolist()):
            if length + self.generation.max_new_tokens > self.bridge.context:
                name = Sample.of(samples[i], i).id
                raise ValueError(
                    f"question {name!r} makes a prompt of {length} tokens and the answer may take "
                    f"{self.generation.max_new_tokens}; the model's context is {self.bridge.context}. Shorten the "
                    "question or set max_new_tokens lower"
                )


def check_scoring(place: Path) -> None:
    """Raises ValueError for a folder that holds neither a verifier nor intact heads; needs no model."""
    if (place / HEADS).is_file() or not (place / VERIFIER).is_file():
        ConsistencyHeads.from_pretrained(place)


def scoring(
    place: Path, model: Any, processor: Any
) -> tuple[ConsistencyHeads | None, Verifier | None, Threshold | None]:
    """What a folder of calibration holds for this model: heads, verifier, and the threshold of its score."""
    heads, verifier, threshold = None, None, None
    verified = (place / VERIFIER).is_file()
    if (place / HEADS).is_file() or not verified:
        heads, threshold = ConsistencyHeads.from_pretrained(place)
        heads = heads.to(model.device)
    if verified:
        verifier, threshold = Verifier.from_pretrained(place, bridge_of(model), processor.tokenizer)
    return heads, verifier, threshold


def _check_images(samples: Sequence[Sample]) -> None:
    for i, sample in enumerate(samples):
        if not (found := Sample.of(sample, i)).images:
            raise ValueError(
                f"{found.name} has no image, and its score says how well image and answer agree; expected at least one"
            )


@contextmanager
def alone(*things: Any) -> Iterator[None]:
    """Locks these objects: inside, no other thread holds any of them.

    A model in use has its mode, `requires_grad` and settings changed temporarily, and a Rust tokenizer cannot be
    borrowed twice. The lock belongs to the object, so all guards of a model share it.
    """
    with _making:
        locks = [_locks.setdefault(thing, threading.RLock()) for thing in things]
    with ExitStack() as stack:
        for lock in sorted(locks, key=id):  # the same order in all threads, so that they cannot deadlock
            stack.enter_context(lock)
        yield


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out; on the CPU PyTorch says so in a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_parts(count: int, run: Callable[[slice], Sequence[T]]) -> list[T]:
    """`run` over `count` rows, at once if they fit into memory, else in halves, and so on.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    done: list[T] = []
    size = count
    while len(done) < count:
        rows = slice(len(done), min(len(done) + size, count))
        try:
            done += run(rows)
            continue
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            failed = str(error).splitlines()[0]
        tried = rows.stop - rows.start
        if tried == 1:
            raise torch.OutOfMemoryError(
                f"a single sample does not fit into memory ({failed}). Load the model in 16 or 4 bits, or let the "
                "processor make smaller images"
            )
        size = (tried + 1) // 2
        warnings.warn(
            f"{tried} samples at once do not fit into memory; they are answered {size} at a time",
            RuntimeWarning,
            stacklevel=3,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return done
