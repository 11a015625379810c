"""Full CMAI: MBAT with a verifier of all that is said of a picture, in loss and attack, and steps on S_c alone."""

from cmai_fast.defences.defence import defence

defence(
    "cmai", "CMAI", inner="bridge", refreshes=1, inner_steps=4, lam=0.5, beta=1.0, gamma=1.0, consistency_steps=5,
)  # fmt: skip
