"""Fine-tuning on clean images only, the baseline of adversarial training."""

from cmai_fast.defences.defence import defence

defence("clean", "Clean fine-tuning", inner="none", beta=0.0, gamma=0.0, arm=False)
