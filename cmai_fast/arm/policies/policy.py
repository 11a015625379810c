"""The input and output of a policy, and the registry. Importing it does not load PyTorch: names are checked early."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from cmai_fast.files import plain
from cmai_fast.registry import Registry
from cmai_fast.settings import described, kinds_of, typed

if TYPE_CHECKING:
    from cmai_fast.data import Sample
    from cmai_fast.pipeline import Pipeline

# What decides: a function of a `Case`, or an object with `decide_batch`; see `policy`.
Decider = Any
D = TypeVar("D", bound=Callable[..., Any])


@dataclass(frozen=True)
class Decision:
    """What the guard decided about one image and one question.

    Attributes:
        answer: shown to the user; None if it is withheld.
        score: S_c of the image and the question with the model's answer, in [-1, 1]. NaN (a broken model) is never
            answered.
        threshold: tau; lower scores go to the policies.
        route: "answer", or the name of the policy that decided.
        question: as asked.
        withheld_answer: the model's own answer if it differs from `answer`; for a reviewer, never for the user. None if
            `answer` is the model's own.
        id: of the sample, if it has one.
        details: added by the policy, such as votes; values that JSON can hold.
    """

    answer: str | None
    score: float
    threshold: float
    route: str
    question: str
    withheld_answer: str | None = None
    id: str | int | None = None
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> str:
        """One line of JSON, with all attributes; a score that is not finite is null."""
        record = asdict(self) | {"score": self.score if math.isfinite(self.score) else None}
        return json.dumps(plain(record), allow_nan=False)


@dataclass(frozen=True)
class Case:
    """One question whose answer scored below the threshold.

    Attributes:
        sample: the images, as 8-bit RGB pictures, and the question.
        answer: the model's answer, withheld so far.
        score: S_c of that answer.
        threshold: tau.
        pipeline: the model, for policies that query it again.
    """

    sample: Sample
    answer: str
    score: float
    threshold: float
    pipeline: Pipeline

    @property
    def answered(self) -> Sample:
        """The sample with the model's own answer as its reference."""
        return replace(self.sample, references=(self.answer,))

    def decision(self, answer: str | None, route: str, **details: Any) -> Decision:
        """The decision of the policy called `route`."""
        withheld = None if answer == self.answer else self.answer
        return Decision(
            answer, self.score, self.threshold, route, self.sample.prompt, withheld, self.sample.id, details
        )


@dataclass(frozen=True)
class Policy:
    """A policy in `POLICIES`.

    Attributes:
        name: as in `--policy`.
        label: its name in lists.
        settings: its own settings, with their defaults.
        kinds: the types that each of these takes.
        make: gives the policy with these settings, as keyword arguments.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    kinds: Mapping[str, tuple[type, ...]]
    make: Callable[..., Decider]

    def with_settings(self, settings: Mapping[str, Any]) -> Decider:
        """The policy with these settings, as values or as text.

        Raises:
            ValueError: an unknown setting, or a value that it does not take.
        """
        read = {}
        for key, value in settings.items():
            if key not in self.settings:
                raise ValueError(f"{self.name} has no setting {key!r}; {self._listed()}")
            try:
                read[key] = typed(value, self.kinds[key])
            except ValueError:
                raise ValueError(f"{self.name}: {key} is {value!r}; {self._listed()}") from None
        return self.make(**read)

    def _listed(self) -> str:
        own = [f"{key} ({described(self.kinds[key], default)})" for key, default in self.settings.items()]
        return f"its settings are {', '.join(own)}" if own else "it has no settings"


POLICIES: Registry[Policy] = Registry("policy", "cmai_fast.arm.policies", frozenset({"policy"}))


def policy(name: str, *, label: str) -> Callable[[D], D]:
    """Registers a policy as `name`; `label` is its name in lists.

    It is one of:

    - a function of a `Case` that returns a `Decision`, or None to pass the case on. Keyword-only arguments with a
      default are its settings;
    - a dataclass whose fields, each with a default, are its settings. `decide_batch(cases)` takes at least one case,
      all of the same pipeline, and returns one Decision or None per case. `bind(pipeline)`, if it has one, is called
      when a `Guard` is made: it loads and checks what the policy needs for this model, and returns what decides (the
      policy itself, or another object or function).

    Settings are bool, int, float, str or None, or tuples of names (`tuple[str, ...]`).
    """

    def register(thing: D) -> D:
        names = getattr(thing, "__globals__", None) or vars(sys.modules[thing.__module__])
        if isinstance(thing, type):
            if not dataclasses.is_dataclass(thing) or not {"decide_batch", "bind"} & set(dir(thing)):
                raise TypeError(
                    f"policy {name!r} is the class {thing.__name__}; expected a dataclass with decide_batch or bind"
                )
            own: list[tuple[str, Any, Any]] = [(f.name, f.default, f.type) for f in dataclasses.fields(thing)]
            make: Callable[..., Decider] = thing
        else:
            taken = inspect.signature(thing).parameters.values()
            only = [p for p in taken if p.kind is p.KEYWORD_ONLY]
            own = [(p.name, p.default, p.annotation) for p in only]
            make = functools.partial(functools.partial, thing) if own else lambda: thing
        if bare := [key for key, default, _ in own if default in (dataclasses.MISSING, inspect.Parameter.empty)]:
            raise TypeError(f"policy {name!r} has settings without a default: {', '.join(bare)}")
        settings = {key: default for key, default, _ in own}
        kinds = {key: kinds_of(annotation, names, f"policy {name!r}") for key, _, annotation in own}
        POLICIES.add(name, Policy(name, label, settings, kinds, make))
        return thing

    return register


def chain(names: Sequence[str], settings: Mapping[str, Any] | None = None) -> list[Decider]:
    """The policies of these names, in this order, with `settings` by `NAME.SETTING`.

    Raises:
        ValueError: an unknown policy or setting, or a value that the policy does not take.
    """
    split = check_settings(names, settings or {})
    return [POLICIES[name].with_settings(split[name]) for name in names]


def check_settings(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`settings` by policy. Imports no policy, so that a misspelt name does not wait for PyTorch.

    Raises:
        ValueError: an unknown policy, or a setting of none of these.
    """
    split: dict[str, dict[str, Any]] = {}
    for name in names:
        POLICIES.check(name)
        split[name] = {}
    for key, value in settings.items():
        name, _, setting = key.partition(".")
        if name not in split or not setting:
            raise ValueError(
                f"setting {key}={value}: expected POLICY.SETTING with one of the policies {', '.join(split)}, "
                "such as smooth.draws=32 with the policy smooth"
            )
        split[name][setting] = value
    return split


def decide(decider: Decider, cases: Sequence[Case]) -> list[Decision | None]:
    """What this policy says to each of the cases.

    Raises:
        TypeError: it returns something else than one Decision or None per case.
    """
    batched = getattr(decider, "decide_batch", None)
    found = [decider(case) for case in cases] if batched is None else list(batched(cases))
    if len(found) != len(cases) or any(not isinstance(d, Decision) for d in found if d is not None):
        raise TypeError(
            f"the policy {decider!r:.80} returned {found!r:.80} for {len(cases)} cases; expected one Decision "
            "(case.decision(answer, name)) or None per case"
        )
    return found
