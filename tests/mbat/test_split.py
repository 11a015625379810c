"""Split batches: in the mean over draws the step is the whole one; one draw is one plain backward pass."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from cmai_fast.attacks import Passes, Victim
from cmai_fast.bridge import bridge_of
from cmai_fast.mbat import MBATConfig, MBATTrainer, last_checkpoint
from cmai_fast.mbat import split as split_module
from cmai_fast.mbat import step as step_module
from cmai_fast.mbat.inner import bridge_gradient
from cmai_fast.mbat.memory import GradientMemory
from cmai_fast.mbat.split import adversarial_rows
from families import FAMILIES, answer_tokens
from training_steps import of_step, same, scarce

SPLIT: dict[str, Any] = {"split": True, "gamma": 0.0, "arm": False, "beta": 0.2}


def drawn(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    monkeypatch.setattr(split_module, "adversarial_rows", lambda ids, share, seed: torch.tensor(rows))


@pytest.mark.parametrize(
    "settings",
    [{"inner": "bridge"}, {"inner": "bridge", "refreshes": 1, "loss_reduction": "samples"}, {"inner": "fgsm"}],
)
def test_the_mean_over_draws_is_the_whole_step(make_trainer, collate, data, monkeypatch, settings):
    """Over all draws of two samples, each with its probability: loss, logged parts and every gradient."""
    batch, lam = collate([data[i] for i in range(2)]), 0.3
    settings = SPLIT | settings | {"lam": lam}
    expected = of_step(make_trainer(**settings | {"split": False}), batch)
    mean: dict[str, torch.Tensor] = {}
    for rows in itertools.product((False, True), repeat=2):
        drawn(monkeypatch, rows)
        found = of_step(make_trainer(**settings), batch)
        for name, value in found.items():
            mean[name] = mean.get(name, 0.0) + lam ** sum(rows) * (1 - lam) ** (2 - sum(rows)) * value.double()
    # Not S_c, which nothing trains here, nor what is counted of attacks.
    names = {k for k in expected if not k.endswith(("_gradients", "s_c_clean", "s_c_adv", "contrastive"))}
    # Norms of the language model run in float32, whatever the weights' precision.
    same({k: mean[k] for k in names}, {k: expected[k] for k in names}, rtol=1e-4, atol=1e-7)
    grad = "model.multi_modal_projector.linear_1.weight"
    assert (found[grad] - expected[grad]).norm() > 0.05 * expected[grad].norm()  # one draw is far from the mean


def test_draws_are_independent_and_have_their_share():
    ids = torch.arange(4000)
    one, two = (adversarial_rows(ids, 0.3, seed) for seed in (5, 5 + 7_919))
    for rows, share in ((one, 0.3), (two, 0.3), (one & two, 0.09), (one[1:] & one[:-1], 0.09)):
        assert float(rows.double().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
    assert not adversarial_rows(ids, 0.0, 5).any() and adversarial_rows(ids, 1.0, 5).all()
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adversarial_rows(ids[order][:50], 0.3, 5), one[order][:50])  # whatever the batch


def test_what_is_attacked_follows_seed_and_step(make_trainer, monkeypatch):
    """The samples of two epochs are not drawn alike, and micro-batches of a step by one seed."""
    seen: list[int] = []
    rows = adversarial_rows
    monkeypatch.setattr(
        split_module, "adversarial_rows", lambda ids, share, seed: seen.append(seed) or rows(ids, share, seed)
    )
    make_trainer(**SPLIT, max_steps=2, gradient_accumulation_steps=2, save_strategy="no", seed=3).train()
    make_trainer(**SPLIT, max_steps=2, save_strategy="no", seed=4).train()
    assert seen[0] == seen[1] and seen[2] == seen[3] and len(set(seen)) == 4


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_one_draw_is_one_plain_backward(family, tmp_path, monkeypatch):
    settings = {"inner_steps": 2, "lam": 0.4, "use_cpu": True, "report_to": "none"} | SPLIT | {"beta": 0.0}
    config = MBATConfig(output_dir=str(tmp_path), **settings)
    trainer = MBATTrainer(copy.deepcopy(family.model()).train(), config, processing_class=family.processor)
    batch, rows = family.batch(family.model(), family.samples()), torch.tensor([False, True, True])
    drawn(monkeypatch, rows.tolist())
    found = []
    attack = trainer._attack
    trainer._attack = lambda *args: found.append((args[0], attack(*args))) or found[-1][1]  # type: ignore[func-returns-value]
    model = copy.deepcopy(trainer.model).train()
    total = trainer.training_step(trainer.model, batch)
    whole = Victim(bridge_of(model), trainer.space, batch)
    ((victim, result),) = found
    images = whole.split(whole.pixels())
    for row, own in zip((1, 2), victim.split(result.adv), strict=True):
        assert 1 / 255 < (own - images[row]).abs().amax() < 8.1 / 255
        images[row] = own
    counts = answer_tokens(family, batch["labels"])
    loss = (counts * whole(trainer.space.to_model(whole.join(images))).loss).sum() / counts.sum()
    torch.testing.assert_close(total, loss.detach(), rtol=1e-4, atol=1e-5)
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    got = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4 * float(1 + grad.abs().max()))


def test_a_memory_keeps_the_last_samples_in_8_bits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    p = {i: torch.randn(3, 16, generator=generator) * 10.0 ** (i - 3) for i in range(5)}
    memory = GradientMemory(3)
    memory.keep([0, 1], [p[0], p[1]])
    memory.keep([2, 0, 3], [p[2], p[4], p[3].bfloat16()])  # 0 again, with another gradient
    assert len(memory) == 3 and memory.find(1) is None and memory.find(7) is None
    memory.save(tmp_path / "kept")
    again = GradientMemory(2)
    again.load(tmp_path / "kept")
    assert len(again) == 2 and again.find(2) is None
    for sample, kept in ((0, p[4]), (3, p[3].bfloat16().float())):
        found = memory.find(sample)
        assert torch.equal(again.find(sample), found)
        assert ((found - kept).abs() <= kept.abs().amax(1, keepdim=True) / 253).all() and not torch.equal(found, kept)
    memory.keep([9], [torch.zeros(3, 16)])
    assert torch.equal(memory.find(9), torch.zeros(3, 16))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_gradient_that_a_step_left_is_that_of_its_images(family, tmp_path, monkeypatch):
    """Of clean samples and attacked ones, and the next attack starts from it, beside a sample that was not seen."""
    settings = {"inner_steps": 2, "use_cpu": True, "report_to": "none", "split_memory": 9} | SPLIT | {"beta": 0.0}
    config = MBATConfig(output_dir=str(tmp_path), **settings)
    trainer = MBATTrainer(copy.deepcopy(family.model()).train(), config, processing_class=family.processor)
    batch = family.batch(family.model(), family.samples()) | {"sample_ids": torch.tensor([4, 5, 6])}
    mixed, maximise, seen = [], step_module.maximise, []
    whole = trainer._mixed
    monkeypatch.setattr(trainer, "_mixed", lambda *args: mixed.append(whole(*args)) or mixed[-1])
    monkeypatch.setattr(step_module, "maximise", lambda *a, **k: seen.append(k["bridge_gradient"]) or maximise(*a, **k))
    drawn(monkeypatch, [False, True, True])
    trainer.current_gradient_accumulation_steps = 2
    trainer.training_step(trainer.model, dict(batch))
    assert trainer.passes.full_forward == pytest.approx(1 + 2 / 3)  # the second for p of two samples
    objective = Victim(trainer.bridge, trainer.space, batch | {"pixel_values": mixed[0][0]})
    features = objective.encode(trainer.space.to_model(objective.pixels())).detach().requires_grad_()
    (p,) = torch.autograd.grad(trainer.bridge.losses(features, **objective.batch)[0].sum(), features)

    drawn(monkeypatch, [True, True, True])
    trainer.training_step(trainer.model, batch | {"sample_ids": torch.tensor([4, 7, 6])})
    assert trainer.passes.full_forward == pytest.approx(2 + 2 / 3 + 1 / 3)  # 7 alone was not remembered
    fresh = bridge_gradient(Victim(trainer.bridge, trainer.space, batch))
    assert seen[1].shape == fresh.shape
    for row, expected in enumerate((p[0], fresh[1], p[2])):
        error = (seen[1][row] - expected).norm() / expected.norm()
        assert error < (1e-4 if row == 1 else 0.02)


def test_memory_without_ids_is_refused(make_trainer, batch):
    trainer = make_trainer(**SPLIT, split_memory=4)
    del batch["sample_ids"]
    with pytest.raises(ValueError, match="split_memory is 4, and the batch has no sample_ids"):
        trainer.training_step(trainer.model, batch)


@pytest.mark.parametrize("inner", ["bridge", "pgd"])
def test_a_step_in_parts_is_the_whole_step(make_trainer, collate, data, monkeypatch, inner):
    """One of its parts has no adversarial sample."""
    batch, settings = collate([data[i] for i in range(5)]), SPLIT | {"inner": inner, "lam": 0.5}
    batch["sample_ids"] = next(
        ids for ids in (torch.arange(k, k + 5) for k in range(1000))
        if adversarial_rows(ids, 0.5, 42 + split_module._DRAW).tolist() == [False, False, True, False, True]
    )  # fmt: skip
    settings |= {"split_memory": 4} if inner == "bridge" else {}
    whole, parts = make_trainer(**settings), make_trainer(**settings)
    expected = of_step(whole, batch)
    scarce(parts, 2, "adversarial branch", monkeypatch)
    with pytest.warns(RuntimeWarning, match="do not fit"):
        same(of_step(parts, batch), expected)
    if inner == "bridge":  # what the failed attempt left is not remembered twice, nor read in its own step
        assert list(parts._memory._kept) == list(whole._memory._kept)
        assert all(torch.equal(parts._memory.find(i), whole._memory.find(i)) for i in whole._memory._kept)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"inner": "bridge"}, Passes(1 + 0.5, 1 + 0.5, 1.5, 1.5)),  # p, and three steps, of half of the samples
        ({"inner": "bridge", "refreshes": 1}, Passes(1 + 1, 1 + 1, 1, 1)),
        ({"inner": "bridge", "refreshes": 3}, Passes(1 + 1.5, 1 + 1.5, 0, 0)),  # all refreshed: no p is needed
        ({"inner": "pgd"}, Passes(1 + 1.5, 1 + 1.5, 0, 0)),
        ({"inner": "fgsm"}, Passes(1 + 0.5, 1 + 0.5, 0, 0)),
        ({"inner": "bridge", "lam": 0.0}, Passes(1, 1, 0, 0)),
        ({"inner": "bridge", "lam": 1.0}, Passes(2, 2, 3, 3)),
    ],
)
def test_passes_of_a_step(make_trainer, batch, monkeypatch, config, expected):
    trainer = make_trainer(inner_steps=3, **SPLIT | {"beta": 0.0} | config)
    if "lam" not in config:
        drawn(monkeypatch, [True, False, True, False])
    trainer.training_step(trainer.model, batch)
    assert trainer.passes == expected


def test_samples_without_an_image_count_once(make_trainer, collate, data, monkeypatch):
    samples = [data[0], replace(data[1], images=()), data[2]]
    drawn(monkeypatch, [True, True])
    trainer = make_trainer(**SPLIT, lam=0.5)
    trainer.training_step(trainer.model, collate(samples))
    plain = make_trainer(inner="none", gamma=0.0, beta=0.0, arm=False)
    lone = collate(samples[1:2])
    text_loss = float(plain.training_step(plain.model, lone))
    assert sum(trainer._sums["loss_clean"]) == pytest.approx(text_loss / 3, rel=1e-4)  # the others were not clean


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_as_one_never_interrupted(make_trainer, tmp_path, data):
    config = SPLIT | {
        "max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2, "inner": "bridge",
        "split_memory": 5, "given": {"train_dataset": torch.utils.data.Subset(data, range(8))},
    }  # fmt: skip
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **config)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Interrupt()], **config).train()
    torch.manual_seed(12345)
    resumed = make_trainer(**config)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "out")))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert resumed.passes == whole.passes
    assert len(whole._memory) == 5 and list(resumed._memory._kept) == list(whole._memory._kept)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"gamma": 0.1}, "gamma is 0.1 and split True; expected gamma 0"),
        ({"arm": True}, "arm is True and split True"),
        ({"inner": "none"}, "inner is 'none' and split True"),
        ({"modality": "both"}, "modality is 'both' and split True"),
        ({"consistency_steps": 2}, "consistency_steps is 2 and split True"),
        ({"split": False, "split_memory": 4, "inner": "bridge"}, "split is False and split_memory 4; expected split"),
        ({"inner": "pgd", "split_memory": 4}, "inner is 'pgd' and split_memory 4"),
        ({"label_smoothing_factor": 0.1, "split_memory": 4}, "label_smoothing_factor is 0.1 and split_memory 4"),
        ({"split_memory": -1}, "split_memory is -1; expected a number of samples"),
        ({"objective": "fare", "inner": "pgd", "beta": 0.0}, "objective is 'fare' and split True"),
    ],
)
def test_what_split_batches_have_not_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **SPLIT | wrong)


def test_what_the_trainer_cannot_have_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"heads are given, with which ARM is on.*Set arm=False"):
        make_trainer(**SPLIT | {"arm": None})
    with pytest.raises(ValueError, match="compute_loss_func is given and split is True"):
        make_trainer(**SPLIT, given={"compute_loss_func": lambda *a, **k: None})
