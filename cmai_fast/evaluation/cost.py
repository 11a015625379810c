"""Predicted time and memory of a training step. docs/plan.md has the formulas, and how far measurements are from them.

A pass takes what its matrix products take at the reached share of the peak, and what its weights and activations take
through memory. On a GPU it takes the time in which the host launches it, if that is longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cmai_fast.attacks import Passes
from cmai_fast.evaluation.devices import MACHINE, NETWORK, Device
from cmai_fast.evaluation.sizes import ModelSizes, Side
from cmai_fast.mbat.passes import StepPasses, StepSettings, consistency_passes, step_passes

# What is trained in a step, by name: fields of `StepSettings`, with gamma 0; None: S_c alone.
SOLVERS: Mapping[str, dict[str, Any] | None] = {
    "clean": {"inner": "none"},
    "pgd": {"inner": "pgd"},
    "bridge R=0": {"refreshes": 0},
    "bridge R=1": {"refreshes": 1},
    "bridge R=2": {"refreshes": 2},
    "fare": {"objective": "fare", "inner": "pgd", "lam": 1.0},
    "consistency": None,
}
# Statements that a verifier reads per sample: of easy-VQA in batches of 32, which ask the same of many pictures. At
# most 36, four questions with nine answers each (`cmcv.statements`).
STATEMENTS = 9
_WEIGHT = {4: 0.516, 8: 1.0}  # bytes of a quantised weight: NF4 with a scale of 8 bits per 64 weights; a scale per row
# Bytes that the kernels between products move in a forward pass, per byte that it stores: counted by hand, 5.0 for a
# layer of CLIP's tower and 6.0 for one of Llama, in eager PyTorch under autocast.
_TRAFFIC = 5
_IN_CHUNKS = 1 << 26  # logits beyond which `OutputLayer` makes them in chunks


@dataclass(frozen=True)
class Training:
    """How a model is trained, and where.

    Attributes:
        batch: samples per card.
        element: bytes of an activation, of a weight that is not quantised and of a number of the optimiser's state.
        bits: of the language model's linear layers; None: as the others.
        learns: `all`, or `vision`; a quantised language model never learns.
        recompute, muon, cuda_graphs: as in `MBATConfig`.
        cards: each has a copy of the model or, `sharded` (FSDP2), its share of weights, gradients and state.
    """

    device: Device
    batch: int = 8
    element: int = 2
    bits: int | None = None
    learns: str = "vision"
    recompute: str = "none"
    muon: bool = False
    cards: int = 1
    sharded: bool = False
    cuda_graphs: bool = False

    @property
    def language_learns(self) -> bool:
        return self.learns == "all" and not self.bits

    def recomputed(self, side: str) -> str:
        """`none`, `selective` or `full`."""
        return {"encoder": "full" if side == "vision" else "none"}.get(self.recompute, self.recompute)

    def through_memory(self, size: float) -> float:
        """Seconds for `size` bytes."""
        return size / (self.device.bandwidth * self.device.memory_share)

    def exchanged(self, size: float) -> float:
        """Seconds in which each card gets the parts of all others of `size` bytes."""
        link = self.device.link if self.cards <= MACHINE else min(self.device.link, NETWORK)
        return size * (1 - 1 / self.cards) / link


@dataclass(frozen=True)
class Cost:
    """Of a step: its passes, seconds, and the peak of memory per card in bytes."""

    passes: StepPasses
    seconds: float
    peak: float


def step_cost(
    sizes: ModelSizes,
    how: Training,
    step: StepSettings,
    texts: int = 0,
    statements: float = 0.0,
    alone: bool = False,
) -> Cost:
    """The cost of a step of `batch` samples on each card.

    Args:
        texts: as of `step_passes`.
        statements: that a verifier reads and learns from, per sample, each once if samples share them.
        alone: one of the steps on S_c alone between these.
    """
    passes = consistency_passes(step.anchor) if alone else step_passes(step, texts)
    if step.objective != "task":
        how = replace(how, learns="vision")  # the language side does not run, so nothing of it gets a gradient
    # In a step on S_c alone it does not run either, but the optimiser's state of it is there.
    seconds = _seconds(sizes, replace(how, learns="vision") if alone else how, passes)
    if statements:
        for backward in (False, True):
            seconds += _pass(how, {"verifier": sizes.verifier}, how.batch * statements, backward, True, how.device.host)
    return Cost(passes, seconds, _peak(sizes, how, passes, step, alone))


def mean_cost(full: Cost, alone: Cost, count: int) -> Cost:
    """Of a full step and the `count` steps on S_c alone that follow it: the passes of all, mean seconds, the larger
    peak."""
    outer, inner = full.passes.outer, full.passes.inner
    for _ in range(count):
        outer, inner = outer + alone.passes.outer, inner + alone.passes.inner
    seconds = (full.seconds + count * alone.seconds) / (1 + count)
    return Cost(StepPasses(outer, inner), seconds, max(full.peak, alone.peak))


def _seconds(sizes: ModelSizes, how: Training, passes: StepPasses) -> float:
    whole, total = {"vision": sizes.vision, "language": sizes.language}, _update(sizes, how)
    for part, learns in ((passes.outer, True), (passes.inner, False)):
        for name, sides, tokens in (
            ("full", whole, 1.0),
            ("vision", {"vision": sizes.vision}, 1.0),
            ("text", {"language": sizes.language}, sizes.text),
        ):
            for way in ("forward", "backward"):
                runs = getattr(part, f"{name}_{way}")
                # The host launches a graph at once.
                host = 0.0 if how.cuda_graphs and name == "vision" and not learns else how.device.host
                total += runs * _pass(how, sides, how.batch * tokens, way == "backward", learns, host)
    return total


def _pass(how: Training, sides: Mapping[str, Side], samples: float, backward: bool, learns: bool, host: float) -> float:
    """Seconds of one pass of these sides, forward or backward, of as many samples; `host` as of `Device`."""
    card = launched = 0.0
    for name, side in sides.items():
        taught = learns and (name != "language" or how.language_learns)
        again = how.recomputed(name) if backward and name != "verifier" else "none"
        # Backward, products with the weights and, where they learn, with the activations.
        products = (1 + taught if backward else 1) + (again == "full")
        rate = how.device.peak[how.element] * how.device.products
        weights = how.through_memory(side.weights * how.element)
        card += products * max(samples * side.flops / rate, weights)
        if name == "language" and how.bits:  # read, written in 16 bits, read by the product
            dequantised = side.quantisable * (_WEIGHT[how.bits] + 2 * how.element)
            card += (1 + (again == "full")) * how.through_memory(dequantised)
        stored = samples * sum(layer.stored(how.element, False) for layer in side.layers)
        card += how.through_memory(_TRAFFIC * stored * ((2 if backward else 1) + (again != "none")))
        launched += len(side.layers) * host * ((2 if backward else 1) + (again != "none")) / 3
    gathered = sum(side.weights for side in sides.values()) * how.element if how.sharded else 0.0
    return max(card, launched, how.exchanged(gathered))


def _update(sizes: ModelSizes, how: Training) -> float:
    """Seconds of the optimiser's step, and of averaging gradients over the cards."""
    trained = _trained(sizes, how)
    own = trained / (how.cards if how.sharded else 1)
    seconds = how.through_memory(7 * own * how.element)  # reads and writes of weights, gradients and both moments
    if how.muon:  # five iterations of three products (`muon.orthogonal`), most of them with a layer's width
        flops = sum(5 * 6 * layer.weights * layer.width for side in _learning(sizes, how) for layer in side.layers)
        seconds += flops / (how.device.peak[how.element] * how.device.products)
    return seconds + how.exchanged((1 if how.sharded else 2) * trained * how.element)


def _learning(sizes: ModelSizes, how: Training) -> list[Side]:
    return [sizes.vision, sizes.language] if how.language_learns else [sizes.vision]


def _trained(sizes: ModelSizes, how: Training) -> int:
    return sum(side.weights for side in _learning(sizes, how))


def _peak(sizes: ModelSizes, how: Training, passes: StepPasses, step: StepSettings, alone: bool) -> float:
    """Weights, the optimiser's state, and the most that is there beside them at one of four times."""
    parts, element = how.cards if how.sharded else 1, how.element
    fare = step.objective == "fare"
    copied = fare or step.anchor > 0  # the vision side as it was
    quantised = sizes.language.quantisable if how.bits else 0
    weights = float(sizes.vision.weights * (2 if copied else 1) + sizes.language.weights - quantised) * element
    weights += quantised * _WEIGHT.get(how.bits or 0, 0.0)
    trained = _trained(sizes, how)
    gradients, of_language = trained * element / parts, (trained - sizes.vision.weights) * element / parts
    # AdamW keeps two numbers per weight, Muon one.
    matrices = sum(layer.weights for side in _learning(sizes, how) for layer in side.layers) if how.muon else 0
    state = (2 * trained - matrices) * element
    logits = min(how.batch * sizes.logits, _IN_CHUNKS) * (element + 2 * 4)  # and float32 copies in the loss
    vision, attacked = (_graph(sizes.vision, how, "vision", learns) for learns in (True, False))
    language, read = (
        _graph(sizes.language, how, "language", learns) + logits for learns in (how.language_learns, False)
    )
    # The clean branch leaves gradients; its view of the images waits for the contrastive loss, or that of features, and
    # in FSDP2 for the end of the step.
    if alone or step.inner == "none":
        branches, waits = False, False
    else:
        branches = step.objective == "task"
        waits = bool(step.gamma) or how.sharded if branches else not (fare and step.lam == 1)
    before = waits * vision + branches * (of_language if waits else gradients)
    attacks = passes.inner != Passes()
    captured = attacked if how.cuda_graphs and attacks else 0.0  # a graph keeps its memory between attacks
    times = {
        "attack": before + attacks * (attacked - captured + bool(passes.inner.full_forward) * read),
        "adversarial branch": before + vision + bool(passes.outer.full_forward) * language,
        "backward pass of the vision side": (1 + waits) * vision + gradients,
        "optimiser's step": gradients + trained * element / parts,  # AdamW needs a temporary copy
    }
    held = how.device.process + (weights + state) / parts + _gathered(sizes, how) + captured
    return held + max(times.values())


def _graph(side: Side, how: Training, name: str, learns: bool) -> float:
    """Bytes that the backward pass of a batch through this side needs."""
    each = [layer.stored(how.element, learns) for layer in side.layers]
    mode = how.recomputed(name)
    if mode == "none" or not each:
        return how.batch * sum(each)
    kept = sum(
        layer.stored_selectively(how.element) if mode == "selective" else layer.tokens * layer.width * how.element
        for layer in side.layers
    )
    return how.batch * (kept + max(each))  # and the layer that is recomputed


def _gathered(sizes: ModelSizes, how: Training) -> float:
    """Bytes of weights that FSDP2 holds whole: all outside of layers, and two layers."""
    if not how.sharded:
        return 0.0
    layers = [layer.weights for side in (sizes.vision, sizes.language) for layer in side.layers]
    return (sizes.vision.weights + sizes.language.weights - sum(layers) + 2 * max(layers)) * how.element
