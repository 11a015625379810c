"""What an attack of a suite aims at for a sample: away from an answer, towards another one, or at a given text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cmai_fast.attacks import ATTACKS, OtherAnswers, Victim
from cmai_fast.data import Sample
from cmai_fast.data.choices import places_of
from cmai_fast.data.sample import differing
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.metrics.exact_match import folded
from cmai_fast.pipeline import Pipeline

# By row: the image that an attack starts from, and which reference it moves away from.
Starts = Mapping[int, tuple[Tensor, int | None]]


class Worst(Mapping[int, tuple[Tensor, "int | None"]]):
    """The worst image of each sample by the task's score, and the reference of the attack that gave it (`Starts`)."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[float, Mapping[int, Tensor], int | None]] = {}

    def see(self, rows: Sequence[int], scores: Sequence[float], images: Mapping[int, Tensor], spec: AttackSpec) -> None:
        """Takes the images of an attack with the scores of their answers; of equals, the first stays."""
        for row, score in zip(rows, scores, strict=True):
            if row not in self._found or score < self._found[row][0]:
                self._found[row] = score, images, spec.reference

    def __getitem__(self, row: int) -> tuple[Tensor, int | None]:
        _, images, reference = self._found[row]
        return images[row], reference

    def __contains__(self, row: object) -> bool:
        return row in self._found

    def __iter__(self) -> Iterator[int]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def reaches(spec: AttackSpec, prediction: str) -> bool:
    """Whether a text is a target of a targeted attack, ignoring case, extra spaces and the mark at the end.

    Of an attack that needs a target (`Attack.aimed`), a longer text may also begin with it.
    """
    said, wanted = folded(prediction), [folded(text) for text in spec.targets]
    return said in wanted or (ATTACKS[spec.name].aimed and said.startswith(tuple(wanted)))


def check_target(spec: AttackSpec, texts: Sequence[str] | None) -> None:
    """Raises ValueError for a target that a dual encoder cannot give, since it is none of its `texts`."""
    known = set(map(folded, texts or ()))
    missing = [] if texts is None else [text for text in spec.targets if folded(text) not in known]
    if missing and texts is not None:
        raise ValueError(
            f"the target {missing[0]!r} is none of the {len(texts)} texts to choose from, which begin with "
            f"{', '.join(map(repr, texts[:5]))}; name one of them"
        )


def goal(
    spec: AttackSpec, sample: Sample, said: str | None, texts: Sequence[str] | None, reference: int | None = None
) -> Sample | None:
    """The sample with the answer that the attack has as labels; None: there is nothing to aim at for this sample.

    If several answers are right, the early stop of an attack, which knows only one, would otherwise take the model's
    own right answer for a wrong one and stop at once: labels are that answer, unless `spec` names a target or a
    reference.

    Args:
        said: the model's clean answer if it is right, else None.
        texts: those that a dual encoder chooses from; None: the model generates its answers.
        reference: the number of the reference, if not the one of `spec`.
    """
    if spec.target is not None:
        known = sample.references if said is None else (*sample.references, said)
        others = differing(spec.targets, known)
        return replace(sample, references=(spec.targets[0],)) if len(others) == len(spec.targets) else None
    number = spec.reference if reference is None else reference
    if number is not None:
        frequent = _by_frequency(sample.references)
        return replace(sample, references=(frequent[number],)) if number < len(frequent) else None
    if spec.other is not None:
        if texts is None and not sample.choices:
            raise ValueError(
                f"{sample.name} has no choices, and {spec.key} moves to one of them; give records with choices, or "
                "use an attack on open answers (apgd with the loss margin)"
            )
        if spec.other >= len(_others(sample, said, texts)):
            return None
    if said is None or said == sample.answer:
        return sample
    # A dual encoder is moved away from all right texts at once (`DualBridge.losses`).
    return replace(sample, references=(said, *(() if texts is None else differing(sample.references, [said]))))


def aim(
    victim: Victim, spec: AttackSpec, pipeline: Pipeline, samples: Sequence[Sample], said: Sequence[str | None]
) -> None:
    """Sets what `victim`, whose labels are the answers of `goal`, has to know of the other answers.

    Raises:
        ValueError: a sample without choices, or with fewer than `dlr` takes.
    """
    victim.targeted = spec.target is not None
    spec = replace(spec, target=spec.targets[0]) if spec.targets else spec
    ratio = spec.settings.get("loss") == "dlr"
    if spec.other is None and not ratio:
        return
    texts = texts_of(pipeline)
    if texts is None:
        found = _generated(victim, spec, pipeline, samples, said)
    else:
        found = _chosen(victim, spec, texts, samples, said)
    victim.others = found
    if ratio and found.least < 3:
        row = int(found.counts.argmin())
        raise ValueError(
            f"{samples[row].name} has {int(found.counts[row]) + 1} answers to choose from, and the loss dlr compares "
            "at least 4; use margin (--set loss=margin)"
        )
    if spec.other is not None:  # by rank at the clean image, as AutoAttack chooses its target classes
        with victim.attack_mode(), torch.no_grad():
            leads = found.leads(victim.outputs(victim.encode(victim.space.to_model(victim.pixels()))), None)
        place = (found.counts - 1).clamp(0, spec.other)
        found.aim = leads.sort(dim=1, descending=True, stable=True).indices.gather(1, place[:, None]).squeeze(1)


def texts_of(pipeline: Pipeline) -> Sequence[str] | None:
    """The texts that a dual encoder chooses from; None: the model generates its answers."""
    return getattr(pipeline.collate, "texts", None)


def _by_frequency(references: Sequence[str]) -> list[str]:
    """Distinct references, the most frequent first; ties in their own order."""
    first: dict[str, str] = {}
    for text in references:
        first.setdefault(folded(text), text)
    count = Counter(map(folded, references))
    return [first[key] for key in sorted(first, key=lambda key: -count[key])]


def _others(sample: Sample, said: str | None, texts: Sequence[str] | None) -> tuple[str, ...]:
    own = sample.references if said is None else (*sample.references, said)
    return differing(sample.choices if texts is None else texts, own)


def _generated(
    victim: Victim, spec: AttackSpec, pipeline: Pipeline, samples: Sequence[Sample], said: Sequence[str | None]
) -> OtherAnswers:
    lists, labels = [], []
    for sample, own in zip(samples, said, strict=True):
        others = _others(sample, own, None)
        if not others:
            raise ValueError(
                f"{sample.name} has no wrong choices, which this attack compares; give records with choices, or use "
                "the loss margin"
            )
        if spec.target is not None:
            others = (own or sample.answer, *differing(others, [spec.target]))
        lists.append(others)
    label = [spec.target or own or sample.answer for sample, own in zip(samples, said, strict=True)]
    for k in range(max(map(len, lists))):
        answers = [own[k] if k < len(own) else label[i] for i, own in enumerate(lists)]
        rows = [replace(s, references=(a,)) for s, a in zip(samples, answers, strict=True)]
        labels.append(pipeline.collate(rows)["labels"])
    found = OtherAnswers.parting(victim.batch["labels"], labels)
    if spec.target is not None:
        found.aim = torch.zeros_like(found.counts)
    return found


def _chosen(
    victim: Victim, spec: AttackSpec, texts: Sequence[str], samples: Sequence[Sample], said: Sequence[str | None]
) -> OtherAnswers:
    found = OtherAnswers.classes(victim.batch["labels"], len(texts))
    places = places_of(texts)
    if spec.target is not None:
        own = [places[folded(a or s.answer)][0] for s, a in zip(samples, said, strict=True)]
        found.aim = torch.tensor(own, device=found.place.device)
        return found
    for i, sample in enumerate(samples):
        for text in sample.references:
            found.place[i, places.get(folded(text), [])] = -1  # another right answer
    return found
