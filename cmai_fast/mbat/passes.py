"""How many model passes a training step takes, from its settings alone: what `MBATTrainer.passes` counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cmai_fast.attacks import Passes
from cmai_fast.mbat.verifier import INNER_STEPS


@dataclass(frozen=True)
class StepSettings:
    """The fields of `MBATConfig` that decide it, with its defaults; gamma counts in memory alone, anchor in steps on
    S_c alone and in memory."""

    inner: str = "bridge"
    inner_steps: int = 10
    refreshes: int = 0
    lam: float = 0.5
    objective: str = "task"
    gamma: float = 0.1
    anchor: float = 0.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StepSettings:
        """Those among these values of an `MBATConfig`."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(frozen=True)
class StepPasses:
    """`outer`: of the clean and the adversarial branch, whose backward passes also compute gradients of weights;
    `inner`: of the attack, whose backward passes only propagate to pixels or to the bridge."""

    outer: Passes
    inner: Passes

    @property
    def total(self) -> Passes:
        return self.outer + self.inner


def step_passes(args: StepSettings | Any, texts: int = 0) -> StepPasses:
    """The passes of a step on images that all fit into memory at once, with L_task as its loss.

    Args:
        args: `StepSettings`, or an `MBATConfig` that attacks images.
        texts: how many texts of a sample `ConsistencyHeads` read: its own, and with gamma a wrong answer if it has one.
    """
    texts_read = Passes(text_forward=texts)
    if args.objective != "task":
        return _on_features(args)
    attack = _attack(args)
    if args.inner == "none":
        return StepPasses(_full(1) + texts_read, attack)
    wants_p = args.inner == "bridge" and args.refreshes < args.inner_steps
    clean = _full(1 if args.lam < 1 or wants_p else 0)  # else it is only looked at
    return StepPasses(clean + _full(1) + texts_read, attack)


def consistency_passes(anchor: float = 0.0) -> StepPasses:
    """The passes of a step on S_c alone (`MBATConfig.consistency_steps`, `anchor`)."""
    return StepPasses(_vision(1) + Passes(vision_forward=int(anchor > 0)), _vision(INNER_STEPS))


def _attack(args: Any) -> Passes:
    steps = args.inner_steps
    full = {"none": 0, "fgsm": 1, "pgd": steps, "bridge": args.refreshes}[args.inner]
    return _full(full) + _vision(steps - full if args.inner == "bridge" else 0)


def _on_features(args: Any) -> StepPasses:
    """The original features, the clean ones where the loss has them, and the adversarial ones."""
    clean = args.objective == "sim-clip" or args.lam < 1
    outer = Passes(vision_forward=1 + clean + (args.objective == "fare"), vision_backward=1 + clean)
    return StepPasses(outer, _vision(1 if args.inner == "fgsm" else args.inner_steps))


def _full(count: int) -> Passes:
    return Passes(full_forward=count, full_backward=count)


def _vision(count: int) -> Passes:
    return Passes(vision_forward=count, vision_backward=count)
