"""The attacks that work on any victim. Those on a guard, and those on what users typed, have tests of their own
(attacks/test_adaptive.py, attacks/test_substitution.py, attacks/test_embedding_pgd.py)."""

from cmai_fast.attacks import ATTACKS

UNGUARDED = sorted(name for name, attack in ATTACKS.items() if not (attack.guard or attack.text))
