"""A step that does not fit into memory is done in parts: the same gradients, logs and random numbers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cmai_fast.attacks import Victim
from cmai_fast.bridge import bridge_of
from cmai_fast.evaluation.overhead import SavedActivations
from cmai_fast.mbat import MBATConfig, MBATTrainer, shards
from cmai_fast.mbat.parts import cut
from cmai_fast.pixels import PixelSpace
from families import FAMILIES

REMEDIES = r"set recompute='full'.*smaller images \(its max_pixels or size\).*in 4 bits.*cmai-fast plan"
PLACES = ("encode", "fuse", "clean backward", "attack", "adversarial branch", "second encode")
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"


def scarce(trainer: MBATTrainer, most: int, place: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory runs out there for more than `most` samples at once; returns the sizes that were tried."""
    tried: list[int] = []

    def limited(run: Any, size: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)  # the work is done, and its gradients are there, when memory runs out
            tried.append(size(*args, **kwargs))
            if tried[-1] > most:
                raise torch.OutOfMemoryError(FULL)
            return result

        return call

    if place == "encode":
        trainer.bridge.encode_image = limited(trainer.bridge.encode_image, lambda x, **_: len(x))
    elif place == "fuse":
        trainer.bridge.fuse = limited(trainer.bridge.fuse, lambda x, **_: len(x))
    elif place == "clean backward":
        trainer._clean_branch = limited(trainer._clean_branch, lambda leaf, *_: len(leaf))
    elif place == "attack":
        trainer._attack = limited(trainer._attack, lambda objective, *_: len(objective))
    elif place == "adversarial branch":
        trainer._language_side = limited(trainer._language_side, lambda inputs, *_, **__: len(inputs["labels"]))
    else:
        side = lambda parts: max(len(v.leaf) for p in parts for v in p.views)  # noqa: E731
        trainer._vision_side = limited(trainer._vision_side, side)
    return tried


def of_step(trainer: MBATTrainer, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """In float64: an attack takes signs of gradients, some of which are zero but for rounding."""
    for part in (trainer.model, trainer.heads):
        part.double()
    values = batch["pixel_values"].double()
    total = trainer.training_step(trainer.model, {**batch, "pixel_values": values})
    parameters = {
        **dict(trainer.model.named_parameters()),
        **{f"heads.{k}": p for k, p in trainer.heads.named_parameters()},
    }
    grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    logs = {f"log {k}": torch.tensor(sum(v)) for k, v in trainer._logged.items()}
    return {"total": total, **grads, **logs}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_without_a_loss_of_heads_the_clean_graph_does_not_wait_for_the_attack(
    make_trainer, batch, monkeypatch, gamma
) -> None:
    trainer, live = make_trainer(gamma=gamma, beta=0.0, arm=False, inner="bridge"), []
    attack = trainer._attack
    monkeypatch.setattr(trainer, "_attack", lambda *given: (live.append(held.live), attack(*given))[1])
    with SavedActivations(trainer.model) as held:
        trainer.training_step(trainer.model, batch)
    assert (live[0] > 0) == (gamma > 0) and held.peak > 0


@pytest.mark.parametrize("place, most", [(place, k % 3 + 1) for k, place in enumerate(PLACES)] + [("fuse", 1)])
def test_a_step_in_parts_is_the_whole_step(make_trainer, collate, data, monkeypatch, place, most) -> None:
    batch = collate([data[i] for i in range(5)])
    settings = {"gamma": 0.5, "beta": 0.3, "inner": "bridge", "lam": 0.4}
    whole = make_trainer(**settings)
    expected = of_step(whole, batch)
    parts = make_trainer(**settings)
    tried = scarce(parts, most, place, monkeypatch)
    with pytest.warns(RuntimeWarning, match="samples at once do not fit into memory.*CUDA out of memory"):
        found = of_step(parts, batch)
    assert max(tried) == 5 and parts._rows_at_once == {1: 1, 2: 2, 3: 3}[most]
    same(found, expected)
    assert parts.schedule.state_dict() == pytest.approx(whole.schedule.state_dict())
    tried.clear()
    for trainer in (whole, parts):  # and the next step does not try what failed
        trainer.model.zero_grad()
        trainer.heads.zero_grad()
    same(of_step(parts, batch), of_step(whole, batch))
    assert tried and max(tried) <= most


@pytest.mark.parametrize(
    "settings",
    [
        {"inner": "none"},
        {"lam": 1.0, "inner": "pgd"},
        {"lam": 0.0},
        {"gamma": 0.0},
        {"gamma": 0.0, "beta": 0.0, "arm": False},
    ],
)
def test_other_losses(make_trainer, batch, monkeypatch, settings) -> None:
    expected = of_step(make_trainer(**settings), batch)
    parts = make_trainer(**settings)
    scarce(parts, 3, "fuse", monkeypatch)
    with pytest.warns(RuntimeWarning, match="From now on a step takes at most 2 at once"):
        found = of_step(parts, batch)
    same(found, expected)


def test_gradients_of_earlier_micro_batches_stay(make_trainer, collate, data, monkeypatch) -> None:
    batches = [collate([data[i] for i in rows]) for rows in ((0, 1, 2, 3), (4, 5, 6, 7))]
    whole, parts = make_trainer(), make_trainer()
    for trainer in (whole, parts):
        trainer.current_gradient_accumulation_steps = 2
        of_step(trainer, batches[0])
    scarce(parts, 2, "adversarial branch", monkeypatch)
    with pytest.warns(RuntimeWarning, match="do not fit"):
        found = of_step(parts, batches[1])
    same(found, of_step(whole, batches[1]))


def test_an_evaluation_in_parts_is_the_whole_evaluation(make_trainer, data, monkeypatch) -> None:
    rows = [data[i] if i % 4 else replace(data[i], images=()) for i in range(5)]
    found = []
    for most in (None, 2):
        trainer = make_trainer(eps=0.3, eval_attack_steps=2, eval_dataset=rows, per_device_eval_batch_size=5)
        trainer.model.double(), trainer.heads.double()
        collate = trainer.data_collator
        trainer.data_collator = lambda samples, collate=collate: {
            k: v.double() if k == "pixel_values" else v for k, v in collate(samples).items()
        }
        if most:
            tried = scarce(trainer, most, "encode", monkeypatch)
            with pytest.warns(RuntimeWarning, match="3 samples .*From now on an evaluation takes at most 2 at once"):
                found.append(trainer.evaluate())
            assert max(tried) == 3 and trainer._rows_at_once is None
        else:
            found.append(trainer.evaluate())
    for name in ("loss", "accuracy", "s_c", "robust_loss", "robust_accuracy", "robust_s_c"):
        assert found[1][f"eval_{name}"] == pytest.approx(found[0][f"eval_{name}"], rel=1e-6), name


def test_a_failed_attempt_leaves_gradients_as_they_were(make_trainer, batch, monkeypatch) -> None:
    trainer = make_trainer()
    trainer.training_step(trainer.model, dict(batch))
    before = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    scarce(trainer, 0, "clean backward", monkeypatch)
    with (
        pytest.warns(RuntimeWarning, match=rf"at most 1 at once.*To need less, {REMEDIES}"),
        pytest.raises(torch.OutOfMemoryError, match=rf"a single sample does not fit.*To need less, {REMEDIES}"),
    ):
        trainer.training_step(trainer.model, dict(batch))
    after = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_other_errors_are_not_taken_for_a_lack_of_memory(make_trainer, batch, monkeypatch) -> None:
    trainer = make_trainer()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer, "_attack", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.training_step(trainer.model, dict(batch))
    assert trainer._rows_at_once is None
    monkeypatch.setattr(trainer, "_attack", lambda *_: torch.empty(1 << 50))  # the allocator's own error
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"):
        trainer.training_step(trainer.model, dict(batch))


def test_dropout_of_the_vision_side_is_the_same_in_both_of_its_passes(make_trainer, batch, monkeypatch) -> None:
    trainer = make_trainer(gamma=0.0, beta=0.0, arm=False)
    tower = trainer.model.model.vision_tower
    seen: list[torch.Tensor] = []
    tower.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state) if m.training else None)
    for layer in tower.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_hook(lambda m, a, out: nn.functional.dropout(out, 0.3, m.training))
    scarce(trainer, 2, "fuse", monkeypatch)
    with pytest.warns(RuntimeWarning):
        trainer.training_step(trainer.model, dict(batch))
    passes = [x for x in seen if len(x) == 2]  # of each part clean, again, adversarial; then these again
    assert len(passes) == 8
    assert all(torch.equal(passes[first], passes[again]) for first, again in ((0, 1), (2, 6), (3, 4), (5, 7)))
    assert not torch.equal(passes[0], passes[2])


def test_a_failed_attempt_takes_no_random_numbers(make_trainer, batch, monkeypatch) -> None:
    found = []
    for fails in (False, True):
        trainer = make_trainer()
        for layer in trainer.model.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.register_forward_hook(lambda m, a, out: nn.functional.dropout(out, 0.3, m.training))
        trainer._rows_at_once = None if fails else 2
        torch.manual_seed(0)
        if fails:
            scarce(trainer, 2, "adversarial branch", monkeypatch)
            with pytest.warns(RuntimeWarning):
                found.append(of_step(trainer, batch))
        else:
            found.append(of_step(trainer, batch))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_a_sharded_model_says_what_to_do_instead(make_trainer, batch, monkeypatch) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(shards, "is_sharded", lambda model: True)
    scarce(trainer, 2, "fuse", monkeypatch)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"CUDA out of memory.*halve per_device_train_batch_size and double.*max_pixels"
    ):
        trainer.training_step(trainer.model, dict(batch))
    assert trainer._rows_at_once is None


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_batch_of_any_family_is_cut_by_samples(family, tmp_path, monkeypatch) -> None:
    batch = family.batch(family.model(), family.samples())
    batch["sample_ids"] = torch.tensor([7, 3, 9])
    space = PixelSpace.from_processor(family.processor)
    objective = Victim(bridge_of(family.model()), space, batch)
    whole = objective(space.to_model(objective.pixels())).loss
    losses = []
    for part in cut(objective, batch, 2):
        own = Victim(bridge_of(family.model()), space, part)
        losses.append(own(space.to_model(own.pixels())).loss)
    torch.testing.assert_close(torch.cat(losses), whole, rtol=1e-4, atol=1e-5)

    def trainer() -> MBATTrainer:
        settings = {"inner_steps": 2, "lam": 0.4, "eps": 0.1, "use_cpu": True, "report_to": "none", "recompute": "none"}
        config = MBATConfig(output_dir=str(tmp_path), **settings)
        torch.manual_seed(0)
        return MBATTrainer(copy.deepcopy(family.model()), config, processing_class=family.processor)

    one, two = trainer(), trainer()
    expected = of_step(one, batch)
    scarce(two, 2, "adversarial branch", monkeypatch)
    with pytest.warns(RuntimeWarning):
        found = of_step(two, batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = float(1 + value.abs().max())
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-7 * scale, msg=name)
