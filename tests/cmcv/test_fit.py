"""Fitting heads to a model that stays as it is, and the threshold that goes with them."""

from __future__ import annotations

import pytest
import torch

from cmai_fast.bridge import Bridge
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.fit import fit_heads, fit_threshold
from cmai_fast.data import VQACollator, load_dataset


def make_heads(bridge):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)


@pytest.fixture(scope="module")
def batches(tiny_processor):
    data, collate = load_dataset("easyvqa", "train", 16, seed=2), VQACollator(tiny_processor, negatives=1)
    return [collate([data[i] for i in range(start, start + 8)]) for start in (0, 8)]


def encode(bridge, batch, prefix):
    texts = (batch[prefix + k] for k in ("input_ids", "attention_mask", "labels"))
    return bridge.encode_text(*(t.view(-1, t.shape[-1]) for t in texts))


def cycle(batches):
    while True:
        yield from batches


def test_heads_learn_to_prefer_the_true_answer(tiny_model, batches):
    bridge = Bridge(tiny_model)
    heads, losses = make_heads(bridge), []
    fit_heads(
        bridge, heads, cycle(batches), 60, learning_rate=3e-3, on_step=lambda step, loss: losses.append((step, loss))
    )
    assert [step for step, _ in losses] == list(range(60))
    assert sum(loss for _, loss in losses[-4:]) < 0.7 * sum(loss for _, loss in losses[:4])
    margins = []
    with torch.no_grad():
        for batch in batches:
            image = heads.project_image(bridge.encode_image(batch["pixel_values"]))
            own, wrong = (heads.score(image, heads.project_text(encode(bridge, batch, p))) for p in ("", "negative_"))
            margins.append(own - wrong)
    assert torch.cat(margins).mean() > 0.1
    assert not heads.training


def test_the_model_stays_as_it_is(make_tiny, batches):
    model, _ = make_tiny()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    bridge = Bridge(model)
    heads = make_heads(bridge)
    start = {k: v.clone() for k, v in heads.state_dict().items()}
    rng = torch.get_rng_state()
    modes = []
    fit_heads(
        bridge, heads, cycle(batches), 3, on_step=lambda *_: modes.append(any(m.training for m in model.modules()))
    )
    assert modes == [False] * 3  # features without dropout
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(v, start[k]) for k, v in heads.state_dict().items() if "weight" in k)
    assert torch.equal(torch.get_rng_state(), rng)


def test_batches_without_wrong_answers_will_do(tiny_model, batches):
    bridge, losses = Bridge(tiny_model), []
    plain = [{k: v for k, v in b.items() if not k.startswith("negative_")} for b in batches]
    fit_heads(bridge, make_heads(bridge), cycle(plain), 2, on_step=lambda _, loss: losses.append(loss))
    full = []
    fit_heads(bridge, make_heads(bridge), cycle(batches), 2, on_step=lambda _, loss: full.append(loss))
    # The same heads at step 0: what is left is the softmax over right and wrong answers.
    answers = full[0] - 0.2 * losses[0]
    assert answers > 0 and abs(full[0] - losses[0]) > 0.1


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(tiny_model, batches, steps):
    bridge = Bridge(tiny_model)
    heads = make_heads(bridge)
    before = heads.image_out.weight.clone()
    fit_heads(bridge, heads, cycle(batches), steps)
    assert torch.equal(heads.image_out.weight, before) == (steps == 0)


def test_the_threshold_rejects_its_share():
    scores = torch.linspace(-1, 1, 101)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    threshold = fit_threshold(scores, "calibration", 0.05)
    assert int((scores < threshold.tau).sum()) == 5
    assert (threshold.false_rejection_rate, threshold.samples, threshold.split) == (0.05, 101, "calibration")
    with pytest.raises(ValueError, match="NaN"):
        fit_threshold(torch.tensor([0.1, float("nan")]), "calibration")
