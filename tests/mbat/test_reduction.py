"""The outer loss is `Trainer`'s own: weights after several steps of SGD are those of plain `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from cmai_fast.bridge import Bridge, output_layer, task_loss
from cmai_fast.bridge.output_layer import OutputLayer
from cmai_fast.bridge.token_loss import token_losses
from cmai_fast.data import Sample, VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer
from cmai_fast.mbat import step as step_module


class Answers(Dataset):
    """Eleven samples whose answers have two tokens and five, in turn."""

    def __init__(self) -> None:
        data = load_dataset("easyvqa", "train", 11, seed=3)
        answers = ("red", "a red shape present")
        self.samples = [Sample(s.id, s.images, s.prompt, (answers[i % 2],)) for i, s in enumerate(data)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Answers().samples)


def exact_loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> Tensor:
    """`ForCausalLMLoss` in the model's own precision: it rounds float64 to float32."""
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


SETTINGS: dict[str, Any] = {
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "linear", "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3, "num_train_epochs": 2, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 0.5,
}  # fmt: skip
CLEAN: dict[str, Any] = {"inner": "none", "gamma": 0.0, "beta": 0.0, "arm": False}


def trained(make_tiny: Any, folder: Any, plain: bool, data: Any, given: dict[str, Any], **changes: Any) -> Any:
    model, processor = make_tiny()
    model.double()
    collate = VQACollator(processor)

    def doubled(samples: Any) -> dict[str, Tensor]:
        batch = collate(samples)
        ids = batch.pop("sample_ids")
        # Plain models count positions of padding too, which changes nothing but the rounding of their rotations.
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        own = {"position_ids": positions} if plain else {"sample_ids": ids}
        return {**batch, "pixel_values": batch["pixel_values"].double(), **own}

    kind, config = (Trainer, TrainingArguments) if plain else (MBATTrainer, MBATConfig)
    own = {"remove_unused_columns": False} if plain else CLEAN
    if plain:
        model.loss_function = exact_loss
    trainer = kind(
        model, config(output_dir=str(folder), **(SETTINGS | own | changes)), doubled, data,
        processing_class=processor, **given,
    )  # fmt: skip
    trainer.train()
    return trainer


def assert_same(one: Any, two: Any, start: Any) -> None:
    moved = 0.0
    begin = dict(start.named_parameters())
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        # Rounding reaches 1.0e-10 on a CPU without AVX2; weights move by more than 1e-3 (below).
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8, msg=name)
        moved = max(moved, float((p - begin[name]).detach().abs().max()))
    assert moved > 1e-3
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) >= 4


@pytest.mark.parametrize(
    "data, chunks, changes",
    [
        (Answers, False, {}),  # 11 samples by 2, three batches per step: the last batch of an epoch has 1 sample
        (Answers, True, {"gradient_accumulation_steps": 4}),  # and a last step of two batches
        (Stream, False, {"max_steps": 4}),
        (Stream, False, {"max_steps": 4, "accelerator_config": {"dispatch_batches": True}}),
    ],
)
def test_weights_are_those_of_plain_trainer(make_tiny, tmp_path, monkeypatch, data, chunks, changes):
    calls: list[int] = []
    monkeypatch.setattr(OutputLayer, "_pays", lambda *_: chunks)
    monkeypatch.setattr(output_layer, "token_losses", lambda *a: calls.append(1) or token_losses(*a))
    ours = trained(make_tiny, tmp_path, False, data(), {}, **changes)
    assert bool(calls) == chunks
    assert_same(ours, trained(make_tiny, tmp_path, True, data(), {}, **changes), make_tiny()[0])


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Something else than the cross-entropy: its square, by token."""
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return losses.square().sum() / num_items_in_batch


def test_compute_loss_func_is_the_loss(make_tiny, tmp_path):
    given = {"compute_loss_func": own_loss, "eval_dataset": Answers()}
    ours, plain = (trained(make_tiny, tmp_path, kind, Answers(), given) for kind in (False, True))
    assert_same(ours, plain, make_tiny()[0])
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert "eval_robust_accuracy" in ours.evaluate()


def test_label_smoothing_is_that_of_trainer(make_tiny, tmp_path):
    """Trainer's own smoother does not shift the labels of LLaVA, which it does not know for a causal model."""
    smoother = LabelSmoother(0.3)
    shifted = {"compute_loss_func": lambda *a, **k: smoother(*a, shift_labels=True, **k)}
    ours = trained(make_tiny, tmp_path, False, Answers(), {}, label_smoothing_factor=0.3)
    # The smoother sums in float32.
    for p, q in zip(
        ours.model.parameters(), trained(make_tiny, tmp_path, True, Answers(), shifted).model.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", ["tokens", "samples"])
def test_both_branches_are_reduced_alike(make_tiny, tmp_path, reduction):
    """At eps so small that both branches are one, by hand; two micro-batches of the step have 7 and 2 tokens."""
    model, processor = make_tiny()
    args = MBATConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, gamma=0.0, beta=0.0, arm=False, eps=1e-9,
        inner_steps=1, lam=0.3, loss_reduction=reduction,
    )  # fmt: skip
    trainer = MBATTrainer(model, args, processing_class=processor)
    data, collate = Answers(), VQACollator(processor)
    batches = [collate([data[0], data[1]]), collate([data[2]])]
    trainer.current_gradient_accumulation_steps = 2
    totals = [trainer.training_step(model, dict(b), torch.tensor(9)) for b in batches]
    plain = make_tiny()[0].train()
    losses = []
    for batch in batches:
        text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        bridge = Bridge(plain)
        losses.append(task_loss(*bridge.fuse(bridge.encode_image(batch["pixel_values"]), **text)))
    counts = [torch.tensor([2, 5]), torch.tensor([2])]
    if reduction == "tokens":
        expected = sum((n * loss).sum() for n, loss in zip(counts, losses, strict=True)) / 9
    else:
        expected = sum(loss.mean() for loss in losses) / 2
    torch.testing.assert_close(sum(totals), expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if q[1].grad is not None:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_the_bridge_gradient_is_that_of_each_sample_whatever_it_counts(make_tiny, tmp_path, monkeypatch, lam):
    model, processor = make_tiny()
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, inner_steps=1, lam=lam)
    trainer = MBATTrainer(model, args, processing_class=processor)
    data, seen, attack = Answers(), [], step_module.maximise
    batch = VQACollator(processor)([data[0], data[1], data[2]])
    monkeypatch.setattr(step_module, "maximise", lambda *a, **k: seen.append(k["bridge_gradient"]) or attack(*a, **k))
    trainer.current_gradient_accumulation_steps = 4
    trainer.training_step(model, dict(batch), torch.tensor(40))
    text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    features = trainer.bridge.encode_image(batch["pixel_values"]).detach().requires_grad_()
    (p,) = torch.autograd.grad(task_loss(*trainer.bridge.fuse(features, **text)).sum(), features)
    torch.testing.assert_close(seen[0], p, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("given", [{"compute_loss_func": own_loss}, {"label_smoothing_factor": 0.3}])
def test_beside_another_loss_the_attack_makes_its_own_bridge_gradient(make_tiny, tmp_path, monkeypatch, given):
    model, processor = make_tiny()
    config = {k: v for k, v in given.items() if k != "compute_loss_func"}
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, inner_steps=1, **config)
    function = given.get("compute_loss_func")
    trainer = MBATTrainer(model, args, processing_class=processor, compute_loss_func=function)
    seen, attack = [], step_module.maximise
    monkeypatch.setattr(step_module, "maximise", lambda *a, **k: seen.append(k["bridge_gradient"]) or attack(*a, **k))
    data = Answers()
    trainer.training_step(model, VQACollator(processor)([data[0], data[1]]), torch.tensor(7))
    assert seen == [None] and trainer.passes.full_backward == 3


def test_memory_that_runs_out_under_a_loss_of_the_users_is_said(make_tiny, tmp_path, monkeypatch):
    """It may be a mean over its batch: parts would change it."""
    model, processor = make_tiny()
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = MBATTrainer(model, args, processing_class=processor, compute_loss_func=own_loss)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "_attack", full)
    data = Answers()
    with pytest.raises(torch.OutOfMemoryError, match="A step with a compute_loss_func cannot be split: halve"):
        trainer.training_step(model, VQACollator(processor)([data[0], data[1]]), torch.tensor(7))
