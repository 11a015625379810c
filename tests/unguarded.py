"""The attacks that maximise any loss on any victim. Those on a guard, on text, without a bound or with a loss of their
own have tests of their own (attacks/test_adaptive.py, test_substitution.py, test_embedding_pgd.py, test_joint.py,
test_crossfire.py, test_unbounded.py)."""

from cmai_fast.attacks import ATTACKS

UNGUARDED = sorted(name for name, a in ATTACKS.items() if "loss" in a.named and not (a.guard or a.text or a.unbounded))
