"""Ask several models, and answer if enough of them agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmai_fast.arm.policies.policy import Case, Decision, policy
from cmai_fast.metrics.exact_match import folded
from cmai_fast.pipeline import Pipeline, in_parts


@policy("ensemble", label="Ask other models, and answer if enough agree")
@dataclass(frozen=True)
class Ensemble:
    """Answers with what at least `agree` of the models say. The guarded model has a vote only if it is among them.

    Each model reads the picture by its own processor. An attack made on one model reaches another only as far as it
    transfers, so the models should not be copies of the guarded one.

    Of 200 questions to `easyvqa-llava` (PGD-10 at 8/255; 59% right without), the immunised model alone (`agree=1`)
    answers 100% rightly. Together with the guarded model (`agree=2`) it brings back nothing, but withholds every
    wrong answer: 59% right, 0% wrong.

    Args:
        models: names, folders or hub ids of models, or `Pipeline`s. Those given by name generate with the settings of
            the guarded model, on its device.
        agree: how many have to give the same answer. With one model and `agree=1`, that model answers.
    """

    models: tuple[Any, ...] = ()
    agree: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.models, str) or not self.models:
            raise ValueError(
                f"ensemble: models is {self.models!r}; expected several names or Pipelines, such as "
                "models=easyvqa-llava-immune,runs/b/model"
            )
        if not 1 <= self.agree <= len(self.models):
            raise ValueError(
                f"ensemble: agree is {self.agree} for {len(self.models)} models; expected 1 to {len(self.models)}"
            )

    def bind(self, pipeline: Pipeline) -> _Ensemble:
        """Loads the models that are given by name."""
        models = [m if isinstance(m, Pipeline) else _loaded(m, pipeline) for m in self.models]
        for model in models:
            if model.chooses and getattr(model.collate, "texts", None) is None:
                raise ValueError(
                    f"ensemble: {model.name} is a dual encoder without texts to choose from; give a Pipeline on which "
                    "choose_from(samples) was called"
                )
        return _Ensemble(models, self.agree)


@dataclass(frozen=True)
class _Ensemble:
    models: Sequence[Pipeline]
    agree: int

    def decide_batch(self, cases: Sequence[Case]) -> list[Decision | None]:
        samples = [case.sample for case in cases]
        said = [in_parts(len(samples), lambda at: model.generate(samples[at])) for model in self.models]  # noqa: B023
        return [self._counted(case, row) for case, row in zip(cases, zip(*said, strict=True), strict=True)]

    def _counted(self, case: Case, said: Sequence[str]) -> Decision | None:
        votes = Counter(map(folded, said)).most_common()
        if votes[0][1] < self.agree or (len(votes) > 1 and votes[1][1] == votes[0][1]):
            return None
        answer = next(a for a in (case.answer, *said) if folded(a) == votes[0][0])
        return case.decision(answer, "ensemble", votes=dict(votes))


def _loaded(name: Any, pipeline: Pipeline) -> Pipeline:
    from cmai_fast.models.loading import load_model

    model, processor = load_model(name, device=str(pipeline.model.device))
    return Pipeline(str(name), model, processor, generation=pipeline.generation)
