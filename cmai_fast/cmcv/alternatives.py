"""The answers with which an answer is compared: those that a question of its kind could have had."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cmai_fast.data.sample import Sample, differing
from cmai_fast.metrics.exact_match import folded

MOST = 16
_OPENING = 2  # words by which open questions are of one kind: "what color", "how many", "is there"
_OF_A_KIND = 16


@dataclass(frozen=True)
class Alternatives:
    """Kinds of answers, each a tuple of texts, the most frequent kind first."""

    kinds: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if len({folded(answer) for kind in self.kinds for answer in kind}) < 2:
            raise ValueError(
                f"the answers to compare with are {self.kinds}; expected at least two that differ. Give records with "
                "choices, or with more than one answer"
            )

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Alternatives:
        """The kinds of these samples: their choices or, of samples without, the most frequent answers to questions
        that begin with the same two words.

        Raises:
            ValueError: all samples have the same answer.
        """
        return cls.among((s.prompt, s.references[0] if s.references else None, s.choices) for s in samples)

    @classmethod
    def among(cls, said: Iterable[tuple[str, str | None, Sequence[str]]]) -> Alternatives:
        """`of` samples of which prompt, answer and choices are given."""
        closed: Counter[tuple[str, ...]] = Counter()
        opened: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for prompt, answer, choices in said:
            if choices:
                closed[tuple(choices)] += 1
            elif answer is not None:
                opened[" ".join(folded(prompt).split()[:_OPENING])][answer] += 1
        counted = closed + Counter(
            {tuple(a for a, _ in answers.most_common(_OF_A_KIND)): sum(answers.values()) for answers in opened.values()}
        )
        return cls(tuple(kind for kind, _ in counted.most_common()))

    def to(self, answer: str, choices: Sequence[str] = ()) -> tuple[str, ...]:
        """At most 16 answers that say something else than `answer`: those near it, then those far from it."""
        near, far = self.near_and_far(answer, choices)
        return (near + far)[:MOST]

    def near_and_far(self, answer: str, choices: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Answers that say something else than `answer`: the choices of its question if it has any, else those of the
        kinds with this answer; and all others.

        Others count because a model under attack answers "yes" when asked for a colour.
        """
        own = folded(answer)
        kinds = [kind for kind in self.kinds if own in {folded(a) for a in kind}]
        near = differing(choices or (a for kind in kinds for a in kind), [answer])
        every = (a for kind in (*kinds, *self.kinds) for a in kind)
        return near, differing(every, [answer, *near])
