"""The outer loss is `Trainer`'s own: weights after several steps of SGD are those of plain `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from cmai_fast.bridge import Bridge
from cmai_fast.bridge import bridge as bridge_module
from cmai_fast.bridge.token_loss import token_losses
from cmai_fast.data import Sample, VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer


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
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=name)
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
    monkeypatch.setattr(Bridge, "_pays", lambda *_: chunks)
    monkeypatch.setattr(bridge_module, "token_losses", lambda *a: calls.append(1) or token_losses(*a))
    ours = trained(make_tiny, tmp_path, False, data(), {}, **changes)
    assert bool(calls) == chunks
    assert_same(ours, trained(make_tiny, tmp_path, True, data(), {}, **changes), make_tiny()[0])
