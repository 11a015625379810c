"""A defence: one step of the bridge solver at twice the usual weight of the adversarial branch."""

from cmai_fast.defences import defence

defence("all-adversarial", "All adversarial", inner="bridge", refreshes=0, inner_steps=1, lam=1.0)
