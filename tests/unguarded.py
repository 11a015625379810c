"""The attacks that maximise any loss on any victim, sample by sample. The others have tests of their own.

Those are on a guard, on text, for all samples at once, or with a loss of their own (attacks/test_adaptive.py,
test_substitution.py, test_embedding_pgd.py, test_joint.py, test_crossfire.py, test_universal.py, test_i2v.py).
"""

from cmai_fast.attacks import ATTACKS

UNGUARDED = sorted(name for name, a in ATTACKS.items() if "loss" in a.named and not (a.guard or a.text or a.fit))
