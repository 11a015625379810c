"""An attack borrows the caller's model: modes, requires_grad, .grad and random states are his, whatever happens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from cmai_fast.attacks import ATTACKS, weighted
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.threat import ThreatModel
from own_answers import Case, answer_itself
from unguarded import UNGUARDED

THREAT = ThreatModel("linf", 1.5 / 255)


@pytest.fixture(scope="module")
def disordered(make_tiny) -> Case:
    """A model half in training, half trainable, with some gradients set, and with dropout wherever it has any."""
    case = answer_itself(make_tiny(), samples=3)
    for i, module in enumerate(case.model.modules()):
        module.training = i % 2 == 0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    for i, parameter in enumerate(case.model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
        if i % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    return case


@pytest.fixture(scope="module")
def heads() -> ConsistencyHeads:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = ConsistencyHeads(64, 64, dim=8, hidden=8)
    heads.text.eval()
    heads.image_out.bias.requires_grad_(False)
    heads.image_out.weight.grad = torch.ones_like(heads.image_out.weight)
    return heads


def snapshot(*modules: torch.nn.Module) -> dict[str, list]:
    parameters = [p for m in modules for p in m.parameters()]
    return {
        "modes": [m.training for root in modules for m in root.modules()],
        "requires_grad": [p.requires_grad for p in parameters],
        "grad": [None if p.grad is None else (id(p.grad), p.grad._version, p.grad.tolist()) for p in parameters],
        "weights": [(k, v._version, v.sum().item()) for m in modules for k, v in m.state_dict().items()],
        "random": [torch.get_rng_state().tolist(), random.getstate(), [str(x) for x in np.random.get_state()]],
        "autograd": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
    }


def run(name: str, case: Case, heads: ConsistencyHeads | None = None):
    return ATTACKS[name](
        case.victim(heads=heads), case.clean, THREAT, steps=1 if name == "fgsm" else 4, sample_ids=case.sample_ids,
        loss=weighted(beta=0.5) if heads else None,
    )  # fmt: skip


@pytest.mark.parametrize("name", UNGUARDED)
def test_model_heads_and_random_states_are_as_before(name, disordered, heads):
    before = snapshot(disordered.model, heads)
    assert len(set(before["modes"])) == len(set(before["requires_grad"])) == 2
    assert any(g is None for g in before["grad"]) and any(g for g in before["grad"])
    run(name, disordered, heads)
    assert snapshot(disordered.model, heads) == before


@pytest.mark.parametrize("name", UNGUARDED)
@pytest.mark.parametrize("kth", [1, 2, 4])
def test_also_when_the_kth_forward_fails(name, kth, disordered, heads):
    if name == "fgsm" and kth > 3:
        kth = 3
    before, calls = snapshot(disordered.model, heads), 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == kth:
            raise RuntimeError("out of memory")

    victim = disordered.victim(heads=heads)
    hook = disordered.model.lm_head.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            ATTACKS[name](
                victim, disordered.clean, ThreatModel("linf", 1e-4), steps=1 if name == "fgsm" else 4,
                loss=weighted(beta=0.5),
            )  # fmt: skip
    finally:
        hook.remove()
    assert calls == kth
    assert snapshot(disordered.model, heads) == before
    assert victim.passes.full_forward == kth - 1  # what did run is still on the bill


@pytest.mark.parametrize("name", UNGUARDED)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_works_where_autograd_is_off_and_gives_the_same(name, around, disordered, heads):
    expected = run(name, disordered, heads)
    outside = snapshot(disordered.model, heads)
    with around():
        before = snapshot(disordered.model, heads)
        # Tensors that are born in here, as a caller's would be.
        clean, ids = disordered.clean.clone(), disordered.sample_ids.clone()
        victim = disordered.victim(heads=heads)
        assert clean.is_inference() == victim.batch["labels"].is_inference() == (around is torch.inference_mode)
        result = ATTACKS[name](
            victim, clean, THREAT, steps=1 if name == "fgsm" else 4, sample_ids=ids, loss=weighted(beta=0.5)
        )
        assert snapshot(disordered.model, heads) == before
    assert snapshot(disordered.model, heads) == outside
    assert torch.equal(result.adv, expected.adv) and torch.equal(result.loss, expected.loss)
    assert not torch.equal(result.adv, clean)


@pytest.mark.parametrize("name", UNGUARDED)
def test_the_callers_images_and_texts_are_not_written_to(name, disordered):
    clean = disordered.clean.clone()
    victim = disordered.victim()
    versions = disordered.clean._version, [v._version for v in victim.batch.values()]
    ATTACKS[name](victim, disordered.clean, THREAT, steps=1)
    assert (disordered.clean._version, [v._version for v in victim.batch.values()]) == versions
    assert torch.equal(disordered.clean, clean)


@pytest.mark.parametrize("name", UNGUARDED)
def test_the_models_mode_and_the_random_state_change_nothing(name, disordered, make_tiny):
    """Dropout is off inside, and starts come from the sample ids alone."""
    orderly = answer_itself(make_tiny(), samples=3)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    one = run(name, disordered)
    torch.manual_seed(2)
    torch.testing.assert_close(one.adv, run(name, orderly).adv, rtol=0, atol=0)


def test_the_patch_embedding_is_quick_inside_and_the_callers_own_outside(case32: Case) -> None:
    embedding = case32.model.model.vision_tower.embeddings.patch_embedding
    with case32.victim().attack_mode():
        assert "forward" in vars(embedding)
    assert "forward" not in vars(embedding)
