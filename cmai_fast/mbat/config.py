"""MBATConfig: `TrainingArguments` and what Modality-Bridging Adversarial Training adds to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from cmai_fast.attacks.losses import BALANCES
from cmai_fast.bridge.recompute import MODES
from cmai_fast.mbat.inner import SOLVERS, refresh_steps
from cmai_fast.threat import ThreatModel, WordBall, parse_eps

OBJECTIVES = ("task", "fare", "sim-clip")
REDUCTIONS = ("tokens", "samples")
MODALITIES = ("image", "text", "both")


@dataclass
class MBATConfig(TrainingArguments):
    """All fields of `transformers.TrainingArguments`, and the following. `eps` is in the [0, 1] pixel range.

    The loss is (1 - lam) * L_task(clean) + lam * L_task(adversarial) + gamma * L_contrastive, and adversarial images
    maximise alpha * L_task - beta * S_c. ARM moves beta, eps and lam between their values here and their bounds
    (`ARMSchedule`).

    A field changed later takes effect at once, in training and evaluation. A bad value raises ValueError when it is
    set. `trainable` has to be set before the trainer is made.
    """

    eps: float = field(default=8 / 255, metadata={"help": "Radius of the ball, in the [0, 1] pixel range."})
    norm: str = field(default="linf", metadata={"help": "linf or l2."})
    objective: str = field(
        default="task",
        metadata={
            "help": "What attack and training are about: task (L_task and S_c), or image features alone, at no pass of "
            "the language side: fare (the distance to the original features), sim-clip (the cosine of clean and "
            "adversarial ones)."
        },
    )
    inner: str = field(default="bridge", metadata={"help": "Solver of the inner problem: pgd, bridge, fgsm, or none."})
    inner_steps: int = field(default=10, metadata={"help": "K, steps of the inner problem."})
    inner_step_size: float | None = field(
        default=None, metadata={"help": "Default: decreasing from 2 * eps towards 0; fgsm: 1.25 * eps."}
    )
    refreshes: int = field(default=0, metadata={"help": "R, refreshes of the bridge gradient; 0: the clean branch's."})
    alpha: float = field(default=1.0, metadata={"help": "Weight of L_task in the inner problem."})
    beta: float = field(
        default=0.1,
        metadata={"help": "Weight of S_c in the attack on the image; ARM starts from it. Modality text has none."},
    )
    modality: str = field(
        default="image",
        metadata={
            "help": "What is attacked: image; text, the input embeddings of the prompt's words, in a ball of text_eps "
            "around each; or both."
        },
    )
    text_eps: float = field(
        default=0.1, metadata={"help": "Radius of a word's ball, as a share of the length of its embedding."}
    )
    text_norm: str = field(default="l2", metadata={"help": "l2, or linf, which is relative to the root mean square."})
    balance: str = field(
        default="direction",
        metadata={
            "help": "direction: gradients of L_task and S_c are normalised where they meet, so that beta / alpha is "
            "the share of S_c in a step; none: the gradient of the plain sum."
        },
    )
    consistency_steps: int = field(
        default=0,
        metadata={
            "help": "Steps on S_c alone after each full step, with a verifier as heads: the vision side learns to be "
            "consistent under attack with all that is said of a picture. They cost no pass of the language model."
        },
    )
    anchor: float = field(
        default=0.0,
        metadata={
            "help": "Weight, in steps on S_c alone, of how far features of attacked images are from those of the clean "
            "ones before training (the distance of `fare`). It keeps clean accuracy where data say little of a "
            "picture, for a copy of the vision side and one more of its forward passes."
        },
    )
    lam: float = field(default=0.5, metadata={"help": "Weight of the adversarial branch, in [0, 1]."})
    gamma: float = field(
        default=0.1, metadata={"help": "Weight of the contrastive loss; 0: the heads are not trained."}
    )
    loss_reduction: str = field(
        default="tokens",
        metadata={
            "help": "tokens: as in Trainer, the mean over all answer tokens of an optimizer step; samples: the mean "
            "over samples of each sample's mean over its tokens."
        },
    )
    eps_warmup: float = field(default=0.0, metadata={"help": "Share of training over which eps rises from 0."})
    trainable: str = field(default="all", metadata={"help": "all, or vision (vision tower and projector alone)."})
    arm: bool | None = field(
        default=None,
        metadata={
            "help": "Let ARM raise beta, eps and lam while S_c of adversarial images is low. Default: where there are "
            "trained heads. Heads that this run trains count after 300 steps."
        },
    )
    tau_train: float | None = field(
        default=None,
        metadata={
            "help": "Mean S_c of adversarial images below which ARM acts. Default: that of the clean images less half "
            "their standard deviation."
        },
    )
    variance_max: float | None = field(
        default=None,
        metadata={
            "help": "Variance of S_c of adversarial images above which ARM acts; 1: none. Default: 1.5 times that of "
            "the clean images."
        },
    )
    # Only beta moves by default: it redirects the attack. A larger eps is another threat than the one asked for, and a
    # larger lam costs clean accuracy.
    beta_max: float | None = field(
        default=1.0, metadata={"help": "Bound of beta under ARM. None, or at most beta: beta is not moved."}
    )
    beta_step: float | None = field(
        default=None, metadata={"help": "Rise of beta per optimizer step. Default: a twentieth of its range."}
    )
    eps_max: float | None = field(
        default=None, metadata={"help": "Bound of eps under ARM. None, or at most eps: eps is not moved."}
    )
    eps_step: float | None = field(
        default=None, metadata={"help": "Rise of eps per optimizer step. Default: a twentieth of its range."}
    )
    lam_max: float | None = field(
        default=None, metadata={"help": "Bound of lam under ARM. None, or at most lam: lam is not moved."}
    )
    lam_step: float | None = field(
        default=None, metadata={"help": "Rise of lam per optimizer step. Default: a twentieth of its range."}
    )
    muon: bool = field(
        default=False, metadata={"help": "Train hidden matrices with Muon, the rest with AdamW; `optim` is not used."}
    )
    recompute: str = field(
        default="none",
        metadata={"help": "Activations that are recomputed instead of stored: none, encoder, selective or full."},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "The vision side of the inner problem runs as CUDA graphs, where each sample has one image: for a "
            "GPU that computes faster than the CPU launches. A graph keeps the memory that a pass needs."
        },
    )
    eval_attack_steps: int = field(
        default=20, metadata={"help": "Steps of the PGD attack in evaluations at full eps; 0: clean metrics only."}
    )
    heads_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the consistency heads."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Collators need all columns of a record."})

    @property
    def words(self) -> WordBall | None:
        """The ball of each word of the prompt; None if the text is not attacked."""
        return None if self.modality == "image" else WordBall(self.text_norm, self.text_eps)  # type: ignore[arg-type]

    @property
    def lowers_consistency(self) -> bool:
        """Whether the attack lowers S_c: beta is above 0 and images, which S_c reads, are attacked."""
        return self.beta > 0 and self.modality != "text"

    @property
    def threat(self) -> ThreatModel:
        """The ball of the current `norm` and `eps`."""
        return ThreatModel(self.norm, self.eps)  # type: ignore[arg-type]  # checked there

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in MBATConfig.__annotations__ and self.__dict__.get("_made"):
            try:
                self._check()
            except ValueError:
                super().__setattr__(name, before)
                raise

    def __post_init__(self) -> None:
        self._check()
        if self.fp16:
            raise ValueError("fp16 is not supported: the bridge gradient would be scaled twice. Use bf16 or float32")
        super().__post_init__()
        self._made = True

    def _check(self) -> None:
        """Raises ValueError for a bad value, or two that exclude each other."""
        _ = self.threat, WordBall(self.text_norm, self.text_eps)  # type: ignore[arg-type]
        for name, choices in (
            ("objective", OBJECTIVES),
            ("inner", (*SOLVERS, "none")),
            ("loss_reduction", REDUCTIONS),
            ("balance", BALANCES),
            ("modality", MODALITIES),
            ("recompute", MODES),
            ("trainable", ("all", "vision")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        requirements = {
            "inner_steps": (self.inner_steps >= 1, "at least 1 step of the inner problem"),
            "consistency_steps": (self.consistency_steps >= 0, "at least 0"),
            "eval_attack_steps": (self.eval_attack_steps >= 0, "at least 1, or 0 for no attack"),
            "inner_step_size": (
                self.inner_step_size is None or 0 < self.inner_step_size < math.inf, "above 0 and finite, or None"
            ),
            "lam": (0 <= self.lam <= 1, "a weight of the adversarial branch in [0, 1]"),
            "eps_warmup": (0 <= self.eps_warmup < 1, "a share of training in [0, 1)"),
            "alpha": (0 <= self.alpha < math.inf, "a finite weight of at least 0"),
            "beta": (0 <= self.beta < math.inf, "a finite weight of at least 0"),
            "gamma": (0 <= self.gamma < math.inf, "a finite weight of at least 0"),
            "anchor": (0 <= self.anchor < math.inf, "a finite weight of at least 0"),
            "tau_train": (self.tau_train is None or -1 <= self.tau_train <= 1, "a value of S_c in [-1, 1], or None"),
            "variance_max": (self.variance_max is None or self.variance_max > 0, "above 0, or None"),
            "beta_max": (
                self.beta_max is None or 0 <= self.beta_max < math.inf, "a finite weight of at least 0, or None"
            ),
            "lam_max": (self.lam_max is None or 0 <= self.lam_max <= 1, "a weight in [0, 1], or None"),
            "heads_learning_rate": (0 < self.heads_learning_rate < math.inf, "above 0 and finite"),
        }  # fmt: skip
        for name in ("beta_step", "eps_step", "lam_step"):
            step = getattr(self, name)
            requirements[name] = step is None or 0 < step < math.inf, "above 0 and finite, or None"
        for name, (met, expected) in requirements.items():
            if not met:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")
        if self.eps_max is not None:
            parse_eps(self.eps_max, self.norm, "eps_max")
        if self.anchor:
            alone = "above 0, or anchor 0: features are kept near the original ones in steps on S_c alone"
            self._check_beside(f"anchor {self.anchor}", {"consistency_steps": (self.consistency_steps > 0, alone)})
        if self.objective != "task":
            self._check_features()
        if self.inner == "bridge" and self.objective == "task":
            refresh_steps(self.inner_steps, self.refreshes)
        if self.cuda_graphs:
            self._check_beside("cuda_graphs True", self._graphs_need)
        if self.recompute != "none" and getattr(self, theirs := self._checkpointing):
            raise ValueError(
                f"recompute is {self.recompute!r} and {theirs} is set, which would replace it; expected "
                "one of the two (recompute='full' is the same thing)"
            )

    def _check_features(self) -> None:
        """Raises ValueError for settings that mean nothing where image features alone are attacked and trained."""
        needed = {
            "inner": (self.inner in ("pgd", "fgsm"), "pgd or fgsm: there is no language side to linearise"),
            "modality": (self.modality == "image", "image"),
            "beta": (self.beta == 0, "0: S_c has no part in it"),
            "gamma": (self.gamma == 0, "0: S_c has no part in it"),
            "consistency_steps": (self.consistency_steps == 0, "0: S_c has no part in it"),
            "arm": (not self.arm, "False: ARM acts on S_c"),
            "label_smoothing_factor": (not getattr(self, "label_smoothing_factor", 0), "0: no labels are read"),
            "lam": (self.objective != "sim-clip" or self.lam == 1, "1: clean images are in its loss already"),
        }
        self._check_beside(f"objective {self.objective!r}", needed)

    @property
    def _checkpointing(self) -> str:
        """The name of Trainer's own field for recomputed activations; it is another from transformers 5.23 on."""
        new = getattr(self, "activation_checkpointing", False)
        return "activation_checkpointing" if new else "gradient_checkpointing"

    @property
    def _graphs_need(self) -> dict[str, tuple[bool, str]]:
        """Whether images are attacked, and no layer recomputes activations, which cannot be captured."""
        alone = self.consistency_steps > 0  # these steps attack images whatever the others do
        theirs = self._checkpointing
        return {
            "recompute": (self.recompute == "none", "'none'"),
            theirs: (not getattr(self, theirs), "False"),
            "inner": (self.inner != "none" or alone, "pgd, bridge or fgsm: graphs are of the inner problem"),
            "modality": (self.modality != "text" or alone, "image or both: graphs are of the vision side"),
        }

    @property
    def can_capture(self) -> bool:
        """Whether `cuda_graphs` can be set beside the other fields, in one process on a GPU."""
        one = self.device.type == "cuda" and self.world_size == 1
        return one and all(met for met, _ in self._graphs_need.values())

    def _check_beside(self, setting: str, needed: dict[str, tuple[bool, str]]) -> None:
        for name, (met, expected) in needed.items():
            if not met:
                raise ValueError(f"{name} is {getattr(self, name)!r} and {setting}; expected {name} {expected}")
