"""The attacks on a model without a guard; those on a guard have tests of their own (attacks/test_adaptive.py)."""

from cmai_fast.attacks import ATTACKS

UNGUARDED = sorted(name for name, attack in ATTACKS.items() if not attack.guard)
