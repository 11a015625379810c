"""FGSM-RS: one step from a random start (Wong et al. 2020), the cheapest adversarial training."""

from cmai_fast.defences.defence import defence

defence("fgsm-rs", "FGSM-RS", inner="fgsm", inner_steps=1, lam=1.0, beta=0.0, gamma=0.0, arm=False)
