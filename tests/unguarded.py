"""The attacks that maximise any loss on any victim, sample by sample. The others have tests of their own.

Those are on a guard, on text, without a bound, for all samples at once, or with a loss of their own (attacks/
test_adaptive.py, test_substitution.py, test_embedding_pgd.py, test_joint.py, test_crossfire.py, test_unbounded.py,
test_universal.py, test_i2v.py).
"""

from cmai_fast.attacks import ATTACKS

_OTHER = ("guard", "text", "unbounded", "fit")
UNGUARDED = sorted(name for name, a in ATTACKS.items() if a.losses and not any(getattr(a, kind) for kind in _OTHER))
