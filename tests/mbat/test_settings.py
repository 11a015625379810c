"""One truth: a setting that is changed after the trainer was made counts from then on, everywhere, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Subset

from cmai_fast.mbat import MBATConfig, evaluating
from cmai_fast.mbat import step as step_module
from cmai_fast.threat import ThreatModel


def test_eps_and_norm_set_later_train_and_evaluate(make_trainer, data, monkeypatch):
    trainer = make_trainer(max_steps=1, save_strategy="no", eval_dataset=Subset(data, range(2)), eval_attack_steps=1)
    seen = {"training": [], "evaluation": []}
    attack, look = step_module.maximise, evaluating.verdicts
    monkeypatch.setattr(
        step_module, "maximise", lambda o, c, t, *a, **k: seen["training"].append(t) or attack(o, c, t, *a, **k)
    )
    monkeypatch.setattr(
        evaluating, "verdicts",
        lambda v, t, *a, **k: seen["evaluation"].append(t) or look(v, t, *a, **k),
    )  # fmt: skip
    trainer.args.norm, trainer.args.eps = "l2", 1.5
    trainer.train()
    trainer.evaluate()
    assert seen == {"training": [ThreatModel("l2", 1.5)], "evaluation": [ThreatModel("l2", 1.5)]}
    assert trainer.args.threat == ThreatModel("l2", 1.5)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("eps", 8.0, "did you mean 8/255"),
        ("norm", "l1", "norm is 'l1'"),
        ("inner", "pdg", "inner is 'pdg'"),
        ("lam", 1.5, "lam is 1.5"),
        ("refreshes", 99, "refreshes is 99"),
        ("loss_reduction", "mean", "loss_reduction is 'mean'; expected one of tokens, samples"),
        ("tau_train", 2.0, "tau_train is 2.0; expected a value of S_c"),
        ("beta_step", 0.0, "beta_step is 0.0"),
        ("heads_learning_rate", 0.0, "heads_learning_rate is 0.0; expected above 0 and finite"),
    ],
)
def test_bad_values_are_refused_when_they_are_set(tmp_path, name, value, message):
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    before = getattr(args, name)
    with pytest.raises(ValueError, match=message):
        setattr(args, name, value)
    assert getattr(args, name) == before
    with pytest.raises(ValueError, match=message):
        MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{name: value})


def test_arm_follows_its_settings(make_trainer):
    trainer = make_trainer(beta=0.1, beta_max=0.5, tau_train=0.2)
    schedule = trainer.schedule
    assert trainer.beta == 0.1
    trainer.args.beta = 0.3
    assert trainer.beta == 0.3 and trainer.schedule is schedule
    for _ in range(12):
        trainer.schedule.update(torch.tensor([-0.5]), torch.tensor([0.5]))
    raised = trainer.beta
    assert raised > 0.3 and trainer.lam == 0.5
    trainer.args.beta_max, trainer.args.beta_step, trainer.args.lam_max = 0.32, 0.01, 0.9
    assert 0.3 < trainer.beta <= 0.32 < raised
    assert trainer.lam > 0.5
    trainer.args.tau_train = 0.9
    assert trainer.schedule.tau_train == 0.9
    trainer.args.arm = False
    assert trainer.schedule is None and trainer.beta == 0.3


def test_the_rate_of_the_heads_set_later_is_that_of_their_next_step(make_trainer):
    trainer = make_trainer(max_steps=1, save_strategy="no", heads_learning_rate=0.5, lr_scheduler_type="constant")
    trainer.args.heads_learning_rate = 0.25
    trainer.train()
    assert trainer._heads_optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name, value", [("trainable", "vision"), ("recompute", "full")])
def test_what_is_built_into_the_model_cannot_be_changed_later(make_trainer, name, value):
    trainer = make_trainer()
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=rf"{name} was '.*' when the trainer was made and is '{value}' now"):
        trainer.train()


def test_heads_that_are_asked_for_too_late_are_named(make_tiny, data, collate, tmp_path):
    from cmai_fast.mbat import MBATTrainer

    model, processor = make_tiny()
    args = MBATConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, beta=0.0, gamma=0.0, arm=False, max_steps=1
    )
    trainer = MBATTrainer(model, args, collate, data, processing_class=processor)
    args.gamma = 0.5
    with pytest.raises(ValueError, match=r"gamma is 0.5 and beta 0.0, and there are no consistency heads"):
        trainer.train()
