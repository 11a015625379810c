"""Standard sets of attacks, by name. Imports no PyTorch, so that names are checked early."""

from __future__ import annotations

from collections.abc import Callable

from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.registry import Registry

# (the name of the task) -> attacks; the first also gives the images and scores of a report.
Suite = Callable[[str], list[AttackSpec]]

SUITES: Registry[Suite] = Registry("suite", "cmai_fast.evaluation.suites")
_OTHERS = 9  # target classes of AutoAttack
_GROUND_TRUTHS = 5  # of RobustVLM
_SENTENCES = ("captioning",)  # tasks for which RobustVLM does not aim at words


def suite(name: str, task: str = "vqa") -> list[AttackSpec]:
    """The attacks of a standard set, for `measure`, `compare` or `workflows.evaluate`.

    An attack that no sample of the data has an aim for (a second reference, a ninth other answer) is left out then.

    Args:
        name: in `SUITES`.
        task: as in `--task`; `robustvlm` depends on it.

    Raises:
        ValueError: an unknown name.
    """
    return SUITES[name](task)


def quick(task: str) -> list[AttackSpec]:
    """PGD-10 and FGSM: whether anything breaks, in seconds."""
    return [AttackSpec("pgd", 10), AttackSpec("fgsm")]


def standard(task: str) -> list[AttackSpec]:
    """PGD-50 with 2 restarts, APGD-100 on the cross-entropy and on the margin, towards each of the 9 likeliest other
    answers where answers are closed, Square with 1,000 queries."""
    margin = AttackSpec("apgd", 100, settings={"loss": "margin"})
    return [AttackSpec("pgd", 50, 2), AttackSpec("apgd", 100), margin, *_towards_others(), _square(1000)]


def autoattack(task: str) -> list[AttackSpec]:
    """AutoAttack's plan (Croce and Hein, 2020) for closed answers, without FAB: APGD-100 on the cross-entropy, then
    towards each of the 9 likeliest other answers, then Square with 5,000 queries."""
    return [AttackSpec("apgd", 100), *_towards_others(), _square(5000)]


def robustvlm(task: str) -> list[AttackSpec]:
    """The protocol of RobustVLM (Schlarmann et al., 2024, section 4.2; Schlarmann and Hein, 2023) for generated text.

    APGD-100 away from each of the 5 most frequent ground truths, whose first step is eps; then once more from the worst
    image, with the ground truth that gave it; and but for captions, at the answers "maybe" and "Word".
    """
    first = {"first_step": 1.0}
    away = [AttackSpec("apgd", 100, settings=first, reference=k) for k in range(_GROUND_TRUTHS)]
    words = () if task in _SENTENCES else ("maybe", "Word")
    at = [AttackSpec("apgd", 100, settings=first, target=word) for word in words]
    return [*away, AttackSpec("apgd", 100, settings=first, again=True), *at]


def _towards_others() -> list[AttackSpec]:
    """The margin of all answers at once gets lost where that of one does not."""
    return [AttackSpec("apgd", 100, settings={"loss": "margin"}, other=k) for k in range(_OTHERS)]


def _square(queries: int) -> AttackSpec:
    return AttackSpec("square", queries)


for _suite in (quick, standard, autoattack, robustvlm):
    SUITES.add(_suite.__name__, _suite)
