"""Ask again with weights between the user's and immunised ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmai_fast.arm.policies.policy import Case, Decision, policy
from cmai_fast.models import resolve
from cmai_fast.models.loading import find_heads, load_model
from cmai_fast.pipeline import Pipeline, alone, scoring

_LEVELS = 4  # of alpha by score: cases of one level share a switch


@policy("robust-weights", label="Ask again with weights between the model's own and immunised ones")
@dataclass(frozen=True)
class RobustWeights:
    """Answers with the weights w = (1 - alpha) * own + alpha * robust; alpha = 1 is the immunised model.

    The own weights are never written: their storage is exchanged for that of w and put back afterwards, also after an
    exception, so they stay the same bits. Meanwhile the model is locked. Only parameters that differ are held, in one
    block per device and dtype. A model that is replayed from CUDA graphs would not see the exchange.

    Of 200 questions to `easyvqa-llava` (PGD-10 at 8/255; 128 right without), its guard withholds the answers to 74:
    alpha = 1 answers 70 rightly and 4 wrongly, with `check` 62 rightly and none wrongly. 98% of 60 are right against
    PGD-40 on both models together.

    Args:
        robust: an immunised model of the same architecture: a name, a folder, a run or a hub id; or a folder of LoRA
            adapters, which are merged into their base model.
        alpha: share of the immunised weights; None: by score, from a quarter just below the threshold to 1 at
            threshold - reach.
        reach: the distance below the threshold at which alpha by score is 1; None: 4 for a verifier's log-odds, 0.25
            for a cosine.
        check: answer only if the new answer's score, by what the immunised model was calibrated with, reaches its
            threshold.
    """

    robust: str = ""
    alpha: float | None = 1.0
    reach: float | None = None
    check: bool = False

    def __post_init__(self) -> None:
        if not str(self.robust).strip():
            raise ValueError(
                "robust-weights: robust is empty; expected the name or folder of an immunised model of the same "
                "architecture, as cmai-fast immunize writes it"
            )
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"robust-weights: alpha is {self.alpha}; expected a share above 0 and up to 1, or none")
        if self.reach is not None and not 0 < self.reach < math.inf:
            raise ValueError(f"robust-weights: reach is {self.reach}; expected a distance of scores above 0")

    def bind(self, pipeline: Pipeline) -> _Bound:
        """Loads the immunised weights.

        Raises:
            ValueError: another architecture, quantised weights, or `check` without heads and a threshold.
        """
        robust = _robust_state(self.robust, pipeline)
        with alone(pipeline.model):  # another guard of the model may have exchanged its weights at the moment
            weights = Weights(pipeline.model, robust, str(self.robust))
        heads, verifier, threshold = None, None, None
        if self.check:
            place = find_heads(self.robust)
            if place is not None:
                heads, verifier, threshold = scoring(place, pipeline.model, pipeline.processor)
            if threshold is None:
                raise ValueError(
                    f"robust-weights: {self.robust} has no calibrated score, which check needs; calibrate it "
                    "(cmai-fast calibrate), or set check to false"
                )
        name = f"{pipeline.name} with weights of {self.robust}"
        with weights.switched(1.0, pipeline.processor.tokenizer):  # those that the threshold was set with
            again = Pipeline(name, pipeline.model, pipeline.processor, heads, threshold, pipeline.generation, verifier)
        again.collate = pipeline.collate
        return _Bound(self, weights, again)


@dataclass(frozen=True)
class _Bound:
    settings: RobustWeights
    weights: Weights
    again: Pipeline  # the same model

    def decide_batch(self, cases: Sequence[Case]) -> list[Decision | None]:
        levels = defaultdict(list)
        for row, case in enumerate(cases):
            levels[self._alpha(case)].append(row)
        decisions: list[Decision | None] = [None] * len(cases)
        for alpha, rows in levels.items():
            for row, decision in zip(rows, self._with(alpha, [cases[row] for row in rows]), strict=True):
                decisions[row] = decision
        return decisions

    def _with(self, alpha: float, cases: Sequence[Case]) -> list[Decision | None]:
        samples, again = [case.sample for case in cases], self.again
        again.collate = cases[0].pipeline.collate  # of a dual encoder: the texts of today
        with self.weights.switched(alpha, again.processor.tokenizer):
            if again.threshold is None:
                return [
                    case.decision(answer, "robust-weights", alpha=alpha)
                    for case, answer in zip(cases, again.generate(samples), strict=True)
                ]
            said = zip(cases, *again.answer(samples), strict=True)
        return [
            case.decision(answer, "robust-weights", alpha=alpha, score=score) if score >= again.threshold.tau else None
            for case, answer, score in said
        ]

    def _alpha(self, case: Case) -> float:
        if self.settings.alpha is not None:
            return self.settings.alpha
        reach = self.settings.reach or (4.0 if case.pipeline.verifier else 0.25)
        share = (case.threshold - case.score) / reach
        return 1.0 if not share < 1 else max(1, math.ceil(share * _LEVELS)) / _LEVELS  # 1 also for NaN


class Weights:
    """The weights of a model and those of a robust one, which `switched` exchanges.

    Args:
        model: in use; its parameters and buffers keep their identity, and their storage is exchanged.
        robust: the state of the robust model, on any device.
        name: of the robust model, in errors.

    Raises:
        ValueError: other keys or shapes, or weights that differ and are no floating-point numbers.
    """

    def __init__(self, model: Any, robust: Mapping[str, Tensor], name: str) -> None:
        own = model.state_dict(keep_vars=True)
        if other := sorted(own.keys() ^ robust.keys()):
            raise ValueError(
                f"robust-weights: {name} is of another architecture: only one of the two models has {other[0]!r} (and "
                f"{len(other) - 1} more); expected an immunised copy of the guarded model. Use ensemble for another one"
            )
        self.model = model
        self._exchanged: dict[int, tuple[Tensor, Tensor]] = {}  # a tied weight once
        differing: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for key, mine in own.items():
            theirs = robust[key].detach()
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"robust-weights: {key} has shape {tuple(theirs.shape)} in {name} and {tuple(mine.shape)} in the "
                    "guarded model; expected an immunised copy of the guarded model. Use ensemble for another one"
                )
            same = not mine.is_floating_point() and torch.equal(mine.cpu(), theirs.cpu())
            if type(mine.data) is not Tensor or mine.is_meta or not (mine.is_floating_point() or same):
                raise ValueError(
                    f"robust-weights: {key} is {mine.dtype} ({type(mine.data).__name__}, {mine.device}), and only "
                    "plain floating-point weights can be mixed; load the guarded model unquantised and whole, or use "
                    "ensemble"
                )
            theirs = theirs.to(mine.device, mine.dtype)
            if not torch.equal(mine.detach(), theirs):
                differing[mine.device, mine.dtype].append((mine, theirs))
        for pairs in differing.values():
            block = torch.cat([theirs.reshape(-1) for _, theirs in pairs])
            parts = block.split([mine.numel() for mine, _ in pairs])
            for (mine, _), part in zip(pairs, parts, strict=True):
                self._exchanged[id(mine)] = mine, part.view(mine.shape)

    @contextmanager
    def switched(self, alpha: float, *others: Any) -> Iterator[None]:
        """Inside, the model has the weights (1 - alpha) * own + alpha * robust, and this thread alone uses it.

        `others`: what is locked with it, such as its tokenizer.
        """
        with alone(self.model, *others), torch.no_grad():
            pairs = list(self._exchanged.values())
            own = [mine.data for mine, _ in pairs]
            mixed = [robust if alpha == 1 else torch.lerp(mine.data, robust, alpha) for mine, robust in pairs]
            try:
                _put(mixed, pairs)
                yield
            finally:
                _put(own, pairs)


def _put(storage: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for (tensor, _), data in zip(pairs, storage, strict=True):
        tensor.data = data


def _robust_state(name: str, pipeline: Pipeline) -> Mapping[str, Tensor]:
    where, dtype = resolve(name), pipeline.model.dtype
    folder = Path(where)
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return load_model(name, device="cpu", dtype=dtype)[0].state_dict()
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base_model_name_or_path; add the base model")
    model, _ = load_model(base, device="cpu", dtype=dtype)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
