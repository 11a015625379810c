"""The guard: answers if image and answer are consistent, else passes the case to a chain of policies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmai_fast.arm.policies import Case, Certify, Decision
from cmai_fast.arm.policies.policy import Decider, chain, decide
from cmai_fast.data import Sample
from cmai_fast.data.pictures import read_picture
from cmai_fast.pipeline import Generation, Pipeline


class Guard:
    """Answers with a model, scores every answer with its consistency heads, and passes low scores to policies.

    Threads may share a guard, and guards may share a model: questions to one model take turns.

    Args:
        pipeline: a model with heads.
        policies: tried in this order: names of `POLICIES`, policies with settings (`Smooth(draws=32)`), or functions of
            a `Case`. A case that none decides is rejected.
        threshold: lower scores go to the policies; None: that of the pipeline.
        certify: also certify the verifier's decision about each answer that it accepts (`details["certificate"]`).

    Raises:
        ValueError: no heads, no threshold or one that is not finite, or an unknown policy or one that does not fit the
            model.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        policies: Sequence[str | Decider] = ("reject",),
        *,
        threshold: float | None = None,
        certify: Certify | None = None,
    ) -> None:
        if not pipeline.scores:
            raise ValueError(f"{pipeline.name} has no consistency heads; train them (cmai-fast calibrate)")
        if threshold is None:
            if pipeline.threshold is None:
                raise ValueError(
                    f"{pipeline.name} has heads but no threshold; calibrate it (cmai-fast calibrate) or set threshold"
                )
            threshold = pipeline.threshold.tau
        if not math.isfinite(threshold):
            raise ValueError(f"threshold is {threshold}; expected a finite number, as from cmai-fast calibrate")
        self.pipeline, self.threshold = pipeline, float(threshold)
        if isinstance(policies, str):
            raise ValueError(f"policies is {policies!r}; expected several, such as ({policies!r},)")
        named = [chain([p])[0] if isinstance(p, str) else p for p in (*policies, "reject")]
        self.policies: list[Decider] = [p.bind(pipeline) if hasattr(p, "bind") else p for p in named]
        self.certify = certify

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        heads: str | Path | None = None,
        policies: Sequence[str | Decider] = ("reject",),
        threshold: float | None = None,
        certify: Certify | None = None,
        max_new_tokens: int | None = None,
        **how: Any,
    ) -> Guard:
        """The guard of a model by its name.

        Args:
            name: a `transformers` folder, a run folder (with `model/` and `cmcv/`), a bundled model's name, or an id
                of the Hugging Face hub.
            heads: a folder written by `cmai-fast calibrate`; None: `cmcv/` in the model's folder or beside it.
            policies, certify: as for the class.
            threshold: overrides the saved one.
            max_new_tokens: length of an answer; None: that of the threshold's calibration.
            how: for `cmai_fast.models.loading.load_model`: `device`, `dtype`, `attention`, and what the model's
                `from_pretrained` takes.

        Raises:
            ValueError: no such model, weights damaged or not safetensors, no heads, no threshold, or `max_new_tokens`
                other than those of the saved threshold.
        """
        from cmai_fast.models.loading import find_heads

        place = find_heads(name) if heads is None else Path(heads)
        if place is None:
            raise ValueError(
                f"no consistency heads for {name}: there is no cmcv/ in its folder or beside it. Train them (cmai-fast "
                "calibrate), immunise the model (cmai-fast immunize), or name the folder that holds them"
            )
        generation = None if max_new_tokens is None else Generation(max_new_tokens)
        # The user's own threshold is for answers of any length.
        pipeline = Pipeline.load(name, heads=place, generation=generation, calibrated=threshold is None, **how)
        return cls(pipeline, policies, threshold=threshold, certify=certify)

    def decide(self, image: Any, question: str) -> Decision:
        """The decision for one image and one question.

        Args:
            image: anything that `read_picture` takes, of any size: a path, a PIL image, an array, ... The model's
                processor resizes it. A list or tuple is several images of one question.

        Raises:
            ValueError: an image that cannot be read; a question that is empty or too long.
        """
        return self.decide_batch([image], [question])[0]

    def decide_batch(self, images: Sequence[Any], questions: Sequence[str]) -> list[Decision]:
        """As `decide`, for equally many images and questions; a decision does not depend on the batch."""
        if isinstance(questions, str) or len(images) != len(questions):
            raise ValueError(f"{len(images)} images for questions {questions!r:.80}; expected one question per image")
        asked = []
        for i, (image, question) in enumerate(zip(images, questions, strict=True)):
            self._check_question(question, f"question {i}")
            several = image if isinstance(image, (list, tuple)) else [image]
            asked.append(Sample(i, tuple(read_picture(one, name=f"image {i}") for one in several), question))
        return [replace(decision, id=None) for decision in self._decide(asked)]

    def decide_samples(self, samples: Sequence[Sample]) -> list[Decision]:
        """As `decide_batch`, for samples with ids and any number of images that the model takes."""
        asked = []
        for sample in samples:
            self._check_question(sample.prompt, f"the question of sample {sample.id!r}")
            pictures = tuple(read_picture(image, name=f"image of sample {sample.id!r}") for image in sample.images)
            asked.append(replace(sample, images=pictures, references=()))
        return self._decide(asked)

    def _decide(self, samples: Sequence[Sample]) -> list[Decision]:
        answers, scores = self.pipeline.answer(samples)
        cases = [Case(*row, self.threshold, self.pipeline) for row in zip(samples, answers, scores, strict=True)]
        decided = {i: self._accepted(case) for i, case in enumerate(cases) if case.score >= self.threshold}
        for policy in self.policies:
            rest = [i for i in range(len(cases)) if i not in decided]  # NaN scores too
            if rest:
                found = zip(rest, decide(policy, [cases[i] for i in rest]), strict=True)
                decided |= {i: decision for i, decision in found if decision is not None}
        return [decided[i] for i in range(len(cases))]

    def _accepted(self, case: Case) -> Decision:
        details = {} if self.certify is None else {"certificate": self.certify.certificate(case).to_dict()}
        return case.decision(case.answer, "answer", **details)

    def _check_question(self, question: Any, name: str) -> None:
        if question == "" and self.pipeline.chooses:
            return
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{name} is {question!r}; expected a text that is not empty")
