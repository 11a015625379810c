"""Wrong answers for open questions: answers of other samples of the same kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cmai_fast.data.sample import Sample, differing
from cmai_fast.metrics.exact_match import folded

if TYPE_CHECKING:
    from cmai_fast.tasks.task import Task

YES_NO = ("yes", "no")
MOST = 100  # candidates per kind: free text has thousands of answers, and a batch draws only a few
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?\s*%?")


def answer_kind(answer: str) -> str:
    """`yes/no`, `number` or `text`. Answers of one kind can serve as wrong answers to each other's questions."""
    text = folded(answer)
    if text in YES_NO:
        return "yes/no"
    return "number" if _NUMBER.fullmatch(text) else "text"


def other_answers(sample: Sample, others: Iterable[Sample]) -> tuple[str, ...]:
    """First answers of the others that say something else than the references of this sample.

    Only those of the same kind, or all if there are none. For yes and no the opposite needs no other samples.
    """
    kinds = {answer_kind(r) for r in sample.references}
    known = YES_NO if kinds == {"yes/no"} else ()
    answers = (*known, *(o.references[0] for o in others if o.references))
    wrong = differing(answers, sample.references)
    return tuple(a for a in wrong if answer_kind(a) in kinds) or wrong


def with_choices(samples: Sequence[Sample], task: Task) -> WithChoices:
    """The same samples, each with `choices` from which the contrastive loss draws wrong answers.

    A sample that has choices keeps them. Others get their first reference and the result of `task.wrong_answers`, which
    receives one sample for each of the `MOST` most frequent answers of every kind. The data are read once for this, at
    the first sample without choices; samples are made on access.

    Raises (on access):
        ValueError: a sample without an answer, or without a possible wrong answer.
    """
    return WithChoices(samples, task)


class WithChoices(Sequence[Sample]):
    """Samples with choices; `with_choices` makes it."""

    def __init__(self, samples: Sequence[Sample], task: Task) -> None:
        self._samples, self._task = samples, task

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = Sample.of(self._samples[index], index)
        if sample.choices:
            return sample
        wrong = self._task.wrong_answers(sample, self._candidates(sample))
        if not wrong:
            raise ValueError(
                f"{sample.name}: all samples have the answer {sample.answer!r}, so there is no wrong one; give "
                "choices, or train without the contrastive loss"
            )
        return replace(sample, choices=(sample.answer, *wrong))

    def _candidates(self, sample: Sample) -> list[Sample]:
        kinds = dict.fromkeys(answer_kind(r) for r in (sample.answer, *sample.references))
        rest = [kind for kind in self._frequent if kind not in kinds]
        own = [s for kind in kinds for s in self._frequent.get(kind, ())]
        return own if len(own) > len(sample.references) else own + [s for kind in rest for s in self._frequent[kind]]

    @cached_property
    def _frequent(self) -> dict[str, list[Sample]]:
        """By kind of answer: for each of the most frequent answers one sample, without its pictures."""
        count: Counter[str] = Counter()
        first: dict[str, Sample] = {}
        for i in range(len(self._samples)):
            sample = Sample.of(self._samples[i], i)
            for answer in sample.references[:1]:
                count[folded(answer)] += 1
                first.setdefault(folded(answer), replace(sample, images=(), references=(answer,)))
        frequent: dict[str, list[Sample]] = {}
        for answer in sorted(count, key=lambda a: (-count[a], a)):  # independent of the order of the records
            of_kind = frequent.setdefault(answer_kind(answer), [])
            if len(of_kind) < MOST:
                of_kind.append(first[answer])
        return frequent
