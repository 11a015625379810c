"""FARE (Schlarmann et al. 2024): the vision side keeps its features under attack; no labels, no language side."""

from cmai_fast.defences.defence import defence

defence(
    "fare", "FARE", objective="fare", inner="pgd", inner_steps=10, trainable="vision", lam=1.0, beta=0.0, gamma=0.0,
    arm=False,
)  # fmt: skip
