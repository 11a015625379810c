"""Recomputation changes no number, keeps less, works in evaluation mode, and leaves the layers as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmai_fast.attacks import Victim, exact_gradient
from cmai_fast.attacks.pgd import pgd
from cmai_fast.bridge import Bridge, recomputed, set_recompute
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.evaluation.overhead import SavedActivations
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel

MODES = ["none", "encoder", "selective", "full"]


@pytest.fixture(scope="module")
def batch(tiny_processor):
    data = load_dataset("easyvqa", "train", 4, seed=3)
    return VQACollator(tiny_processor, negatives=1)([data[i] for i in range(4)])


def objective_of(model: Any, batch: dict[str, torch.Tensor]) -> Victim:
    return Victim(Bridge(model), PixelSpace([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]), batch)


def run(make_tiny: Any, batch: dict[str, torch.Tensor], mode: str, how: str) -> tuple[torch.Tensor, int, list[int]]:
    """A gradient at the pixels, the bytes kept for it, and how often each layer ran: in training or in an attack."""
    model, _ = make_tiny()
    set_recompute(model, Bridge(model).vision_side, mode)
    runs = [0, 0]
    for i, layer in enumerate((model.model.vision_tower.encoder.layers[0], model.model.language_model.layers[0])):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    objective = objective_of(model, batch)
    with SavedActivations(model) as held:
        if how == "attack":
            with objective.attack_mode():
                grad = exact_gradient(objective, batch["pixel_values"])[0]
        else:
            model.train()
            grad = exact_gradient(objective, batch["pixel_values"])[0]
    return grad, held.peak, runs


@pytest.mark.parametrize("how", ["attack", "training"])
def test_less_is_kept_and_every_number_stays(make_tiny, batch, how):
    grads, peaks, runs = zip(*(run(make_tiny, batch, mode, how) for mode in MODES), strict=True)
    for grad in grads[1:]:
        assert torch.equal(grad, grads[0])
    none, encoder, _, full = peaks  # what selective keeps lies outside of autograd's own store
    assert full < encoder < none
    # Layers of the vision tower and of the language model; selective runs a layer again too, without its products.
    assert runs == ([1, 1], [2, 1], [2, 2], [2, 2])


class Products(TorchDispatchMode):
    """Counts matrix products and attentions that are really carried out."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(part in str(func) for part in ("aten.mm", "aten.addmm", "aten.bmm", "dot_product"))
        return func(*args, **(kwargs or {}))


def test_selective_repeats_no_product_and_no_attention(make_tiny, batch):
    counted = []
    for mode in ("none", "selective", "full"):
        model, _ = make_tiny()
        set_recompute(model, Bridge(model).vision_side, mode)
        objective = objective_of(model, batch)
        with objective.attack_mode(), Products() as products:
            exact_gradient(objective, batch["pixel_values"])
        counted.append(products.count)
    none, selective, full = counted
    assert none == selective < full


def test_dropout_stays_off_and_layers_are_given_back(make_tiny, batch):
    model, _ = make_tiny()
    set_recompute(model, [], "full")
    model.train()
    before = [(m.training, "forward" in m.__dict__) for m in model.modules()]
    objective = objective_of(model, batch)
    clean = objective.space.to_pixels(batch["pixel_values"])
    state = torch.get_rng_state()
    pgd(objective, clean, ThreatModel("linf", 0.03), steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(m.training, "forward" in m.__dict__) for m in model.modules()] == before
    with pytest.raises(RuntimeError, match="planned"), recomputed(model):
        raise RuntimeError("planned")
    assert [(m.training, "forward" in m.__dict__) for m in model.modules()] == before


def test_a_hook_of_somebody_else_runs_inside_and_comes_back(make_tiny, batch):
    model, _ = make_tiny()
    set_recompute(model, [], "full")
    layer, runs = model.model.language_model.layers[0], []
    plain = layer.forward

    def hooked(*args, **kwargs):
        runs.append(1)
        return plain(*args, **kwargs)

    layer.forward = hooked
    objective = objective_of(model, batch)
    with objective.attack_mode():
        grad = exact_gradient(objective, batch["pixel_values"])[0]
    assert layer.forward is hooked and len(runs) == 2
    assert torch.equal(grad, run(make_tiny, batch, "none", "attack")[0])


def test_the_reentrant_kind_of_the_users_own_does_not_stop_an_attack(make_tiny, batch):
    model, _ = make_tiny()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    objective = objective_of(model, batch)
    with objective.attack_mode():
        grad = exact_gradient(objective, batch["pixel_values"])[0]
    assert torch.equal(grad, run(make_tiny, batch, "none", "attack")[0])


def test_wrong_settings_are_named(make_tiny):
    model, _ = make_tiny()
    with pytest.raises(ValueError, match="recompute is 'all'; expected one of none, encoder, selective, full"):
        set_recompute(model, [], "all")
    with pytest.raises(ValueError, match=r"recompute is 'encoder', but LlavaFor.* has no layers there"):
        set_recompute(model, [], "encoder")
