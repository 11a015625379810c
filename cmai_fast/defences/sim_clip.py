"""Sim-CLIP (Hossain and Imteaz 2024): features of clean and adversarial images attract each other; no labels."""

from cmai_fast.defences.defence import defence

defence(
    "sim-clip", "Sim-CLIP", objective="sim-clip", inner="pgd", inner_steps=10, trainable="vision", lam=1.0, beta=0.0,
    gamma=0.0, arm=False,
)  # fmt: skip
