"""Adversarial training of the vision side by exact PGD (Madry et al. 2018), the reference for MBAT's savings."""

from cmai_fast.defences.defence import defence

defence(
    "pgd-at", "PGD-AT (vision side)", inner="pgd", inner_steps=10, trainable="vision", lam=1.0, beta=0.0, gamma=0.0,
    arm=False,
)  # fmt: skip
