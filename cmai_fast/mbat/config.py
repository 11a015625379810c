"""MBATConfig: `TrainingArguments` and what Modality-Bridging Adversarial Training adds to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from cmai_fast.bridge.recompute import MODES
from cmai_fast.mbat.inner import SOLVERS, refresh_steps
from cmai_fast.threat import ThreatModel


@dataclass
class MBATConfig(TrainingArguments):
    """Every field of `transformers.TrainingArguments`, and these. `eps` is in the [0, 1] pixel range.

    The loss is (1 - lam) * L_task(clean) + lam * L_task(adversarial) + gamma * L_contrastive, and adversarial images
    maximise alpha * L_task - beta * S_c.
    """

    eps: float = field(default=8 / 255, metadata={"help": "Radius of the ball, in the [0, 1] pixel range."})
    norm: str = field(default="linf", metadata={"help": "linf or l2."})
    inner: str = field(default="bridge", metadata={"help": "Solver of the inner problem: pgd, bridge, fgsm, or none."})
    inner_steps: int = field(default=10, metadata={"help": "K, steps of the inner problem."})
    inner_step_size: float | None = field(
        default=None, metadata={"help": "Default: falling from 2 * eps towards 0; fgsm: 1.25 * eps."}
    )
    refreshes: int = field(default=0, metadata={"help": "R, refreshes of the bridge gradient; 0: the clean branch's."})
    alpha: float = field(default=1.0, metadata={"help": "Weight of L_task in the inner problem."})
    beta: float = field(default=0.1, metadata={"help": "Weight of S_c in the inner problem, where ARM starts."})
    lam: float = field(default=0.5, metadata={"help": "Weight of the adversarial branch, in [0, 1]."})
    gamma: float = field(
        default=0.1, metadata={"help": "Weight of the contrastive loss; 0: the heads stay as they are."}
    )
    eps_warmup: float = field(default=0.0, metadata={"help": "Share of training over which eps rises from 0."})
    trainable: str = field(default="all", metadata={"help": "all, or vision (vision tower and projector alone)."})
    arm: bool = field(default=True, metadata={"help": "Let ARM move beta by S_c of adversarial batches."})
    tau_train: float = field(default=0.3, metadata={"help": "S_c of adversarial batches below which beta rises."})
    beta_max: float = field(default=1.0, metadata={"help": "Upper bound of beta under ARM."})
    beta_step: float = field(default=0.05, metadata={"help": "Rise of beta in one update."})
    muon: bool = field(
        default=False, metadata={"help": "Train hidden matrices by Muon, the rest by AdamW; `optim` is not used."}
    )
    recompute: str = field(
        default="none",
        metadata={"help": "Activations computed again instead of kept: none, encoder, selective or full."},
    )
    eval_attack_steps: int = field(
        default=20, metadata={"help": "Steps of the PGD attack in evaluations at full eps; 0: clean metrics alone."}
    )
    heads_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the consistency heads."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Collators of image-text data need them all."})

    def __post_init__(self) -> None:
        self.threat = ThreatModel(self.norm, self.eps)  # type: ignore[arg-type]  # checked there
        if self.inner not in (*SOLVERS, "none"):
            raise ValueError(f"inner is {self.inner!r}; expected one of {', '.join(SOLVERS)}, none")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps is {self.inner_steps}; expected at least 1 step of the inner problem")
        if self.eval_attack_steps < 0:
            raise ValueError(f"eval_attack_steps is {self.eval_attack_steps}; expected at least 1, or 0 for no attack")
        if self.inner_step_size is not None and not 0 < self.inner_step_size < math.inf:
            raise ValueError(f"inner_step_size is {self.inner_step_size}; expected above 0 and finite, or None")
        if self.inner == "bridge":
            refresh_steps(self.inner_steps, self.refreshes)
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam is {self.lam}; the weight of the adversarial branch lies in [0, 1]")
        if not 0 <= self.eps_warmup < 1:
            raise ValueError(f"eps_warmup is {self.eps_warmup}; expected a share of training in [0, 1)")
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected a finite weight of at least 0")
        if self.recompute not in MODES:
            raise ValueError(f"recompute is {self.recompute!r}; expected one of {', '.join(MODES)}")
        new = getattr(self, "activation_checkpointing", False)  # transformers has it from 5.23 on
        theirs = "activation_checkpointing" if new else "gradient_checkpointing"
        if self.recompute != "none" and getattr(self, theirs):
            raise ValueError(
                f"recompute is {self.recompute!r} and {theirs} is set, which would replace it; expected "
                "one of the two (recompute='full' is the same thing)"
            )
        if self.trainable not in ("all", "vision"):
            raise ValueError(f"trainable is {self.trainable!r}; expected all or vision")
        if self.fp16:
            raise ValueError("fp16 is not supported: the bridge gradient would be scaled twice. Use bf16 or float32")
        super().__post_init__()
