"""A training step on every family: the gradients are those of the formula, and a run saves what it trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from cmai_fast.attacks import Victim
from cmai_fast.bridge import bridge_of
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.fit import fit_heads
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat.drift import Original
from families import FAMILIES, Family, answer_tokens

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@pytest.fixture(autouse=True)
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng():  # a Trainer seeds the global generator
        yield


class Samples(Dataset):
    def __init__(self, family: Family) -> None:
        self.samples = family.samples()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return self.samples[i]


def trainer_of(family: Family, folder: Any, heads: ConsistencyHeads | None = None, **settings: Any) -> MBATTrainer:
    model = copy.deepcopy(family.model()).train()
    plain = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "inner_steps": 2, "learning_rate": 1e-3}
    return MBATTrainer(
        model,
        MBATConfig(output_dir=str(folder), per_device_train_batch_size=3, max_steps=1, **{**plain, **settings}),
        train_dataset=Samples(family),
        data_collator=lambda samples: family.batch(family.model(), samples),
        processing_class=family.processor,
        heads=heads,
    )


@pytest.mark.parametrize("refreshes", [0, 1])
@every_family
def test_gradients_are_those_of_the_formula(family, tmp_path, refreshes):
    """(1 - lam) * L_clean + lam * L_adv by one plain backward, at the adversarial images that the step found."""
    bridge = bridge_of(family.model())
    heads = ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)
    trainer = trainer_of(family, tmp_path, heads, lam=0.4, gamma=0.0, beta=0.2, refreshes=refreshes)
    batch = family.batch(family.model(), family.samples())
    found = []
    attack = trainer._attack
    trainer._attack = lambda *args: found.append(attack(*args)) or found[-1]  # type: ignore[func-returns-value]
    model = copy.deepcopy(trainer.model).train()
    total = trainer.training_step(trainer.model, batch)
    objective = Victim(bridge_of(model), trainer.space, batch)
    clean, adv = objective.pixels(), found[0].adv
    assert (adv - clean).abs().amax() > 1 / 255
    counts = answer_tokens(family, batch["labels"])
    clean_loss, adv_loss = (
        (counts * objective(trainer.space.to_model(x)).loss).sum() / counts.sum() for x in (clean, adv)
    )
    loss = 0.6 * clean_loss + 0.4 * adv_loss
    torch.testing.assert_close(total, loss.detach(), rtol=1e-4, atol=1e-5)
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4 * float(1 + grad.abs().max()))


@every_family
def test_a_run_trains_the_vision_side_saves_and_is_loaded_again(family, tmp_path):
    trainer = trainer_of(family, tmp_path, trainable="vision", gamma=0.1, save_steps=1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    vision = {id(p) for p in trainer.bridge.vision_parameters}
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= {n for n, p in trainer.model.named_parameters() if id(p) in vision}
    again = trainer_of(family, tmp_path / "again", trainable="vision", gamma=0.1)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for (name, p), q in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@every_family
def test_evaluation_and_prediction(family, tmp_path):
    trainer = trainer_of(family, tmp_path, eval_attack_steps=2)
    metrics = trainer.evaluate(Samples(family))
    batch = family.batch(family.model(), family.samples())
    objective = Victim(bridge_of(trainer.model), trainer.space, batch)
    with torch.no_grad(), objective.attack_mode():
        expected = objective(trainer.space.to_model(objective.pixels()))
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss.mean()), rel=1e-3, abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(float(expected.right.float().mean()))
    assert metrics["eval_robust_loss"] >= metrics["eval_loss"] - 1e-6
    assert {"eval_robust_accuracy", "eval_s_c", "eval_robust_s_c"} <= set(metrics)
    # The outputs of BLIP-2's language model hold its cache, which no Trainer can gather.
    predicted = trainer.predict(Samples(family), ignore_keys=["past_key_values", "language_model_outputs"])
    assert predicted.predictions is not None
    assert predicted.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


@every_family
def test_heads_are_fitted_to_frozen_features(family):
    model = family.model()
    bridge = bridge_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)
    batch = family.batch(model, family.samples())
    if family.kind == "dual":
        batch["labels"] = torch.arange(3)  # images of one and the same text have nothing to be told apart by
    losses: list[float] = []
    fit_heads(bridge, heads, iter([batch] * 12), 12, learning_rate=1e-2, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0]


@every_family
def test_a_copy_of_the_vision_side_moves_as_a_whole(family):
    """Also what lies outside of its modules, such as row separators and queries; the model itself stays."""
    model = copy.deepcopy(family.model())
    bridge = bridge_of(model)
    batch = family.batch(model, family.samples())
    image, _ = bridge.inputs(batch)
    original = Original(bridge)
    with torch.no_grad():
        features = bridge.encode_image(batch["pixel_values"], **image)
        for p in bridge.vision_parameters:
            p.add_(0.1)
    torch.testing.assert_close(original.features(batch["pixel_values"], image), features)
    original.to(torch.device("meta"))
    assert all(p.device.type == "meta" for p in original._bridge.vision_parameters)
    assert all(p.device.type == "cpu" for p in model.parameters())
