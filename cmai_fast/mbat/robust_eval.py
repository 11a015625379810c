"""Evaluation during training: right or wrong, clean and under an attack independent of the training solver.

The attack is plain PGD on L_task from a random start at the full eps, whatever solver, S_c term and warm-up training
uses, so that it does not share their blind spots. It is weaker than the suites of `cmai_fast.evaluation`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from cmai_fast.attacks import Passes, Victim, exact_gradient
from cmai_fast.attacks.pgd import pgd
from cmai_fast.attacks.victim import attack_mode
from cmai_fast.attacks.words import Words
from cmai_fast.mbat.inner import reworded
from cmai_fast.mbat.shards import is_sharded
from cmai_fast.threat import ThreatModel, WordBall


def verdicts(
    victim: Victim,
    threat: ThreatModel,
    steps: int,
    *,
    seed: int,
    sample_ids: Tensor,
    words: WordBall | None = None,
    images: bool = True,
) -> dict[str, Tensor]:
    """`loss` (L_task), `accuracy` (0 or 1), `s_c` if the victim has one, and the same after the attack as `robust_...`;
    (N,) each.

    A sample is robust if it is right on the clean image and on every image that the attack tried. `robust_loss` and
    `robust_s_c` are those of the attack's result: the first image that fools, else the one with the highest loss. With
    words, it is that image with the words as they were when the sample was fooled, else the last ones.

    Args:
        steps: of the attack; 0: no attack.
        seed, sample_ids: of its random start, as in `attacks.pgd`.
        words: the ball of the prompt's words, if they are attacked too.
        images: False attacks the words alone.

    The model is restored afterwards.
    """
    clean = victim.pixels()
    found = _look(victim, victim.space.to_model(clean))
    if steps:
        before = victim.passes
        attacked = None if words is None else Words(victim.bridge, victim.bridge.inputs(victim.batch)[1], words)
        if not images:
            assert attacked is not None
            with victim.attack_mode():
                features = victim.own_features()
            same = {"robust_s_c": found["s_c"]} if "s_c" in found else {}  # the image did not move
            return found | on_words(attacked, features, steps) | same
        earlier, victim.words = victim.words, attacked
        try:
            result = pgd(victim, clean, threat, steps=steps, seed=seed, sample_ids=sample_ids)
            assert result.model_input is not None
            _keep_pace(victim, clean, before, steps)
            robust = _look(victim, result.model_input) | {"accuracy": (~result.fooled).to(found["loss"])}
        finally:
            victim.words = earlier
        found |= {f"robust_{name}": value for name, value in robust.items()}
    return found


def on_words(words: Words, features: Tensor, steps: int) -> dict[str, Tensor]:
    """The `robust_loss` and `robust_accuracy` of an attack on the words alone."""
    fooled, _ = reworded(words, features, "pgd", steps=steps, early_stop=True)
    with attack_mode(words.bridge.model), torch.no_grad(), words.said():
        losses, right = words.bridge.losses(features, **words.texts)
    return {"robust_loss": losses, "robust_accuracy": (right & ~fooled).to(losses)}


def _look(victim: Victim, model_input: Tensor) -> dict[str, Tensor]:
    with victim.attack_mode(), torch.no_grad():
        features = victim.encode(model_input)
        outputs = victim.outputs(features)
        found = {"loss": outputs.losses, "accuracy": outputs.right.to(outputs.losses)}
        if victim.scores:
            found["s_c"] = victim.score(features).to(outputs.losses)
    return found


def _keep_pace(victim: Victim, clean: Tensor, before: Passes, steps: int) -> None:
    """Runs the passes that PGD skipped because all its samples were fooled; `before` are the passes before the attack.

    Processes that share the shards of a model gather them together in every pass, so none may stop earlier.
    """
    if not is_sharded(victim.bridge.model):
        return
    model_input = victim.space.to_model(clean)
    with victim.attack_mode(), torch.no_grad():
        while victim.passes.full_backward - before.full_backward < steps:
            exact_gradient(victim, model_input)
        while victim.passes.full_forward - before.full_forward < steps + 2:
            victim(model_input)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores the mode of every module and the random state of Python, NumPy and PyTorch afterwards.

    An evaluation uses random numbers in unexpected places: a data loader draws its workers' seed, which would change
    the dropout of the next training step.
    """
    modes = [(m, m.training) for m in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes:
            module.training = mode
