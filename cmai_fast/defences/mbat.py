"""Modality-Bridging Adversarial Training: the bridge gradient of the clean branch, consistency in the inner problem."""

from cmai_fast.defences.defence import defence

defence("mbat", "MBAT", inner="bridge", refreshes=0, inner_steps=10, lam=0.5, beta=0.1, gamma=0.1)
