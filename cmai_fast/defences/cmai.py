"""CMAI: MBAT with a verifier of all that is said of a picture in its loss, and steps on S_c alone.

S_c in the attack (beta) and ARM, which moves it, bought nothing beside the steps on S_c alone; nor did a refresh of the
bridge gradient, at equal time (docs/results.md).
"""

from cmai_fast.defences.defence import defence

defence(
    "cmai", "CMAI", inner="bridge", refreshes=0, inner_steps=4, lam=0.5, beta=0.0, gamma=1.0, arm=False,
    consistency_steps=5, anchor=1.0,
)  # fmt: skip
