"""Evaluation during training: its numbers against plain code, and that nothing of it reaches the training."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset
from transformers import TrainerCallback

from cmai_fast.attacks import Victim
from cmai_fast.attacks.pgd import pgd
from cmai_fast.bridge import is_right, task_loss
from cmai_fast.mbat import MBATConfig, robust_eval
from cmai_fast.threat import ThreatModel

NAMES = {"loss", "accuracy", "s_c", "robust_loss", "robust_accuracy", "robust_s_c"}


def parameters(trainer):
    return {k: v.detach().clone() for k, v in [*trainer.model.named_parameters(), *trainer.heads.named_parameters()]}


def by_hand(trainer, samples, steps, eps):
    """Each sample alone, under PGD of the attack package."""
    found = {name: [] for name in NAMES}
    for sample in samples:
        batch = trainer.data_collator([sample])
        victim = Victim(trainer.bridge, trainer.space, batch, heads=trainer.heads)
        text = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        clean = victim.pixels()
        result = pgd(
            victim, clean, ThreatModel("linf", eps), steps=steps, seed=trainer.args.seed,
            sample_ids=batch["sample_ids"],
        )  # fmt: skip
        found["robust_accuracy"].append(float(not result.fooled))
        for prefix, pixels in (("", clean), ("robust_", result.adv)):
            with torch.no_grad():
                features = trainer.bridge.encode_image(trainer.space.to_model(pixels))
                logits, targets = trainer.bridge.fuse(features, **text)
                found[f"{prefix}loss"].append(float(task_loss(logits, targets)))
                if not prefix:
                    found["accuracy"].append(float(is_right(logits, targets)))
                found[f"{prefix}s_c"].append(float(victim.score(features)))
    return {f"eval_{name}": np.mean(values) for name, values in found.items()}


def trained(make_trainer, data, **config):
    """A trainer whose model is right about some samples, and robust about fewer."""
    trainer = make_trainer(
        max_steps=30, save_strategy="no", inner="none", gamma=0.0, beta=0.0, learning_rate=3e-3,
        eval_dataset=Subset(data, range(10)), per_device_eval_batch_size=4, **config,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_metrics_are_means_over_samples_under_pgd(make_trainer, data):
    """Ten samples in batches of four: the last one is smaller, and counts by its samples."""
    trainer = trained(make_trainer, data, eps=16 / 255, eps_warmup=0.9, eval_attack_steps=3)
    metrics = trainer.evaluate()
    trainer.model.eval()
    expected = by_hand(trainer, [data[i] for i in range(10)], 3, 16 / 255)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    assert metrics["eval_robust_accuracy"] < metrics["eval_accuracy"]
    assert metrics["eval_robust_loss"] > metrics["eval_loss"] + 1e-3
    assert abs(metrics["eval_s_c"] - metrics["eval_robust_s_c"]) > 1e-5


def test_without_steps_there_is_no_attack(make_trainer, data, monkeypatch):
    monkeypatch.setattr(robust_eval, "pgd", lambda *a, **k: pytest.fail("attacked"))
    trainer = make_trainer(eval_dataset=Subset(data, range(5)), eval_attack_steps=0)
    metrics = trainer.evaluate()
    assert {n for n in NAMES if f"eval_{n}" in metrics} == {"loss", "accuracy", "s_c"}
    assert "eval_runtime" in metrics
    with pytest.raises(ValueError, match="eval_attack_steps is -1"):
        MBATConfig(output_dir="x", eval_attack_steps=-1)


def test_without_heads_there_is_no_s_c(make_tiny, data, collate, tmp_path):
    from cmai_fast.mbat import MBATTrainer

    model, processor = make_tiny()
    args = MBATConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, beta=0.0, gamma=0.0, arm=False,
        eval_attack_steps=1,
    )  # fmt: skip
    trainer = MBATTrainer(
        model, args, eval_dataset=Subset(data, range(3)), data_collator=collate, processing_class=processor
    )
    metrics = trainer.evaluate()
    assert {n for n in NAMES if f"eval_{n}" in metrics} == NAMES - {"s_c", "robust_s_c"}


def test_several_datasets_have_metrics_of_their_own(make_trainer, data):
    trainer = make_trainer(
        eval_attack_steps=1, eval_dataset={k: Subset(data, range(n)) for k, n in (("a", 3), ("b", 5))}
    )
    metrics = trainer.evaluate()
    assert {f"eval_{d}_{n}" for d in "ab" for n in NAMES} <= set(metrics)
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]


class Dropout(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.2, self.training)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_with_evaluation_ends_with_the_very_same_weights(make_trainer, data, tmp_path, accumulation):
    """With dropout in training and images that the data draw noise for: both read the global generators."""

    def noisy(samples):
        shift = random.random() + np.random.rand() + float(torch.rand(()))
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] * (1 - 0.1 * shift)}

    ends = []
    for name, evaluation in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1})):
        trainer = make_trainer(
            output_dir=str(tmp_path / name), gradient_accumulation_steps=accumulation, eval_attack_steps=2,
            eval_dataset=Subset(data, range(6)), **evaluation,
        )  # fmt: skip
        collate, trainer.data_collator = trainer.data_collator, noisy
        trainer.model.model.multi_modal_projector.act = torch.nn.Sequential(
            trainer.model.model.multi_modal_projector.act, Dropout()
        )
        trainer.train()
        ends.append((parameters(trainer), trainer.passes, trainer.schedule.state_dict()))
        assert sum("eval_robust_accuracy" in entry for entry in trainer.state.log_history) == 4 * bool(evaluation)
    assert all(torch.equal(value, ends[1][0][key]) for key, value in ends[0][0].items())
    assert ends[0][1:] == ends[1][1:]


def test_the_model_is_given_back_as_it_was(make_trainer, data, monkeypatch):
    trainer = make_trainer(eval_dataset=Subset(data, range(3)), eval_attack_steps=1)
    trainer.model.train()
    trainer.model.model.vision_tower.eval()
    for p in trainer.model.lm_head.parameters():
        p.requires_grad_(False)
        p.grad = torch.ones_like(p)

    def state():
        return (
            [m.training for m in trainer.model.modules()],
            [p.requires_grad for p in trainer.model.parameters()],
            [p.grad is None for p in trainer.model.parameters()],
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        )  # fmt: skip

    before = state()
    trainer.evaluate()
    assert state() == before

    def broken(*args, **kwargs):
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError("planted")

    monkeypatch.setattr(robust_eval, "pgd", broken)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.evaluate()
    assert state() == before


def test_the_most_robust_model_is_loaded_at_the_end(make_trainer, data, monkeypatch):
    trainer = make_trainer(
        max_steps=3, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        eval_attack_steps=1, metric_for_best_model="robust_accuracy", lr_scheduler_type="constant",
        eval_dataset=Subset(data, range(6)),
    )  # fmt: skip
    assert trainer.args.greater_is_better
    accuracies, at, verdicts = iter([0.25, 0.75, 0.5]), [], robust_eval.verdicts

    def planted(*args, **kwargs):
        at.append(parameters(trainer))
        found = verdicts(*args, **kwargs)
        return found | {"robust_accuracy": torch.full_like(found["robust_accuracy"], next(accuracies))}

    monkeypatch.setattr("cmai_fast.mbat.evaluating.verdicts", planted)
    trainer.train()
    assert trainer.state.best_metric == 0.75 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = parameters(trainer)
    assert all(torch.equal(best[k], v) for k, v in at[1].items())
    assert not all(torch.equal(best[k], v) for k, v in at[2].items())


def test_compute_metrics_and_predict_go_on_working(make_trainer, data):
    seen = []

    def shares(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        logits = logits[0] if isinstance(logits, tuple) else logits
        seen.append((logits.shape, labels.shape))
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
        return {"by_logits": right.all(1).mean(), "s_c": 7.0}

    trainer = trained(make_trainer, data, eps=4 / 255, eval_attack_steps=1)
    trainer.compute_metrics = shares
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_by_logits"] == metrics["eval_accuracy"]
    assert seen[0][0][:2] == seen[0][1] and seen[0][1][0] == 10
    assert metrics["eval_s_c"] == 7.0  # the caller's own name stands
    output = trainer.predict(Subset(data, range(6)))
    assert len(output.label_ids) == 6 and output.metrics["test_by_logits"] == output.metrics["test_accuracy"]
    assert "test_robust_accuracy" in output.metrics
    one = trainer.data_collator([data[0]])
    loss, logits, labels = trainer.prediction_step(trainer.model, one, False)
    assert loss.dim() == 0 and torch.equal(labels, one["labels"]) and logits is not None


def test_data_without_labels_are_predicted_without_verdicts(make_trainer, data):
    trainer = make_trainer()
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: {
        k: v for k, v in collate(samples).items() if k != "labels" and not k.startswith("negative")
    }
    output = trainer.predict(Subset(data, range(6)))
    assert not {n for n in NAMES if f"test_{n}" in output.metrics}
    assert len(output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions) == 6


def test_the_progress_bar_is_that_of_trainer(make_trainer, data):
    class Count(TrainerCallback):
        steps = 0

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            assert len(eval_dataloader) == 3
            Count.steps += 1

    make_trainer(
        callbacks=[Count()], eval_dataset=Subset(data, range(6)), per_device_eval_batch_size=2, eval_attack_steps=1
    ).evaluate()
    assert Count.steps == 3


def test_starts_go_by_place_where_samples_have_no_ids(make_trainer, data, monkeypatch):
    seen, verdicts = [], robust_eval.verdicts

    def spy(*args, sample_ids, **kwargs):
        seen.extend(sample_ids.tolist())
        return verdicts(*args, sample_ids=sample_ids, **kwargs)

    monkeypatch.setattr("cmai_fast.mbat.evaluating.verdicts", spy)
    trainer = make_trainer(eval_dataset=Subset(data, range(6)), per_device_eval_batch_size=4, eval_attack_steps=1)
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: {k: v for k, v in collate(samples).items() if k != "sample_ids"}
    trainer.evaluate()
    trainer.evaluate()
    assert seen == [*range(6), *range(6)]


def test_data_without_a_length_are_refused_in_several_processes(make_trainer, data, monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([data[i] for i in range(6)])

    trainer = make_trainer(eval_dataset=Stream(), eval_attack_steps=1, accelerator_config={"dispatch_batches": False})
    assert trainer.evaluate()["eval_samples_per_second"] > 0
    monkeypatch.setattr("cmai_fast.mbat.ranks.count", lambda: 2)
    monkeypatch.setattr("cmai_fast.mbat.ranks.row_numbers", torch.arange)
    monkeypatch.setattr("cmai_fast.mbat.ranks.any_of", bool)
    with pytest.raises(ValueError, match="the evaluation data have no length"):
        trainer.evaluate()
