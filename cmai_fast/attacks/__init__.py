"""Attacks on the image, one file an attack; all maximise an `Objective` and return an `AttackResult`."""

from cmai_fast.attacks.apgd import apgd
from cmai_fast.attacks.objective import Evaluation, Objective, Passes
from cmai_fast.attacks.pgd import fgsm, mi_fgsm, pgd
from cmai_fast.attacks.state import AttackResult

ATTACKS = {"fgsm": fgsm, "pgd": pgd, "mi-fgsm": mi_fgsm, "apgd": apgd}

__all__ = ["ATTACKS", "AttackResult", "Evaluation", "Objective", "Passes", "apgd", "fgsm", "mi_fgsm", "pgd"]
