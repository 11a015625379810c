"""Training on image features alone, at no pass of the language side: FARE and Sim-CLIP, and their step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cmai_fast.attacks import Exact, Victim
from cmai_fast.attacks.victim import Outputs
from cmai_fast.mbat.consistency import ConsistencyTrainer, bad_gradients
from cmai_fast.mbat.drift import cosine_distance, squared_distance
from cmai_fast.mbat.inner import climbed, inner_sizes
from cmai_fast.mbat.parts import WEIGHTS, Part, View

DISTANCES = {"fare": squared_distance, "sim-clip": cosine_distance}


@dataclass(frozen=True)
class Drift:
    """An attack's loss: how far the features are from `target` (N, T, D)."""

    objective: str
    target: Tensor

    def __call__(self, features: Tensor, outputs: Outputs, victim: Victim, rows: Tensor | None) -> Tensor:
        return DISTANCES[self.objective](features, self.target if rows is None else self.target[rows])


class FeatureTrainer(ConsistencyTrainer):
    """The step of `MBATConfig.objective` other than `task`. With phi the vision side, and phi_0 as the trainer got it:

    - `fare` (Schlarmann et al. 2024, eq. 3): phi(x + delta) stays where phi_0(x) is, by the squared distance; the
      attack maximises it. Here over all of h_v, relative to ||phi_0(x)||^2, so that it is a share in every model. With
      `lam` below 1 the rest of the loss is the same distance of phi(x), as a bound on the clean drift.
    - `sim-clip` (Hossain and Imteaz 2024, eq. 4): phi(x + delta) and phi(x) attract each other, by the symmetric cosine
      with stopped gradients; the attack minimises the cosine. There is no phi_0.
    """

    def _feature_side(self, inputs: dict[str, Tensor], *, keep: bool) -> Part:
        """The attack on the features of these samples, and the loss of their adversarial (and clean) images."""
        args, (image, text) = self.args, self.bridge.inputs(inputs)
        if "pixel_values" not in inputs:
            return Part(text, [], None, None, {})
        clean = None
        if args.objective == "sim-clip" or self.lam < 1:
            clean = View.of(lambda: self.bridge.encode_image(inputs["pixel_values"], **image), args.device, keep=keep)
            self._count(vision_forward=1)
        if self._original is not None:
            target = self._before(inputs["pixel_values"], image)
        else:
            assert clean is not None
            target = clean.leaf.detach()
        victim = self._images(inputs)
        ball = self._ball
        sizes = inner_sizes(args.inner, ball.eps, args.inner_steps, args.inner_step_size)
        drift, seed, ids = Drift(args.objective, target), self._attack_seed, inputs["sample_ids"]
        result = climbed(victim, victim.pixels(), ball, drift, Exact(judge=False), sizes, seed, ids)
        self.passes = self.passes + result.passes
        model_input = result.model_input.to(inputs["pixel_values"].dtype)
        adversarial = View.of(lambda: victim.encode(model_input), args.device, keep=keep)
        self._count(vision_forward=1, vision_backward=1 if clean is None else 2)
        sums = self._pulled_together(adversarial.leaf, clean, target, inputs[WEIGHTS])
        views = [adversarial] if clean is None else [clean, adversarial]
        return Part(text, views, None, None, sums | bad_gradients(result))

    def _pulled_together(self, leaf: Tensor, clean: View | None, target: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The losses by name, 0-d, detached; their gradients stay at the leaves."""
        distance, lam = DISTANCES[self.args.objective], self.lam
        adversarial = (weights * distance(leaf, target)).sum()
        total, sums = lam * adversarial, {"loss_adv": adversarial.detach()}
        if self.args.objective == "sim-clip":
            assert clean is not None
            total = (total + lam * (weights * distance(clean.leaf, leaf.detach())).sum()) / 2
        elif clean is not None:
            drift = (weights * distance(clean.leaf, target)).sum()
            total, sums = total + (1 - lam) * drift, sums | {"loss_clean": drift.detach()}
        self._backward(self._share * total)
        return sums
