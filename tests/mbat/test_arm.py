"""ARM in a training run: where it is on, what it moves, and when."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from cmai_fast.arm.schedule import MARGIN, VARIANCE_RATIO
from cmai_fast.bridge import Bridge
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer, adaptive
from cmai_fast.mbat import step as step_module
from cmai_fast.pipeline import Pipeline

WARM = 10  # steps until the averages mean something
REST = {"save_strategy": "no"}


def heads_for(model: Any) -> ConsistencyHeads:
    bridge = Bridge(model)
    torch.manual_seed(0)
    return ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)


@pytest.fixture
def make_bare(make_tiny, data, tmp_path):
    """`make_bare(heads=None, **config)`: a trainer without heads, unless it makes its own."""

    def make(heads: ConsistencyHeads | None = None, **config: Any) -> MBATTrainer:
        model, processor = make_tiny()
        defaults = {"output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        fast = {"inner_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
        return MBATTrainer(
            model,
            MBATConfig(**(defaults | fast | config)),
            VQACollator(processor, negatives=1),
            data,
            processing_class=processor,
            heads=heads,
        )

    return make


def spied(monkeypatch, *names: str) -> dict[str, list[float]]:
    """What the inner problem of every step is given."""
    seen: dict[str, list[float]] = {name: [] for name in names}
    attack = step_module.maximise

    def look(victim, clean, threat, *args, **settings):
        for name in names:
            seen[name].append(threat.eps if name == "eps" else settings[name])
        return attack(victim, clean, threat, *args, **settings)

    monkeypatch.setattr(step_module, "maximise", look)
    return seen


def curve(trainer: MBATTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_without_trained_heads_arm_is_off_and_says_so_once(make_bare, caplog):
    with caplog.at_level(logging.INFO, logger="cmai_fast"):
        trainer = make_bare(beta=0.0, gamma=0.0, max_steps=2)
        trainer.train()
    assert trainer.heads is None and trainer.schedule is None and trainer.beta == 0.0
    assert sum("ARM is off: there are no trained" in r.message for r in caplog.records) == 1
    assert "arm_level" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match=r"beta is 0.3, gamma 0 and heads None.*random heads that never learn"):
        make_bare(beta=0.3, gamma=0.0)


def test_arm_without_trained_heads_is_refused(make_bare, make_tiny):
    with pytest.raises(ValueError, match=r"arm is True.*heads is None and gamma 0.0. Give trained heads"):
        make_bare(beta=0.0, gamma=0.0, arm=True)
    trainer = make_bare(beta=0.0, gamma=0.0)
    trainer.args.arm = True
    with pytest.raises(ValueError, match="arm is True, and there are no trained"):
        trainer.train()
    assert make_bare(heads_for(make_tiny()[0]), beta=0.0, gamma=0.0).schedule is not None, "given heads are trained"


def test_heads_of_this_run_count_once_they_have_learned(make_bare, monkeypatch):
    monkeypatch.setattr(adaptive, "HEADS_LEARN", 12)
    trainer = make_bare(gamma=0.1, beta=0.1, tau_train=1.0, max_steps=14)
    trainer.train()
    assert curve(trainer, "beta") == pytest.approx([0.1] * 12 + [0.145, 0.19])
    trainer.args.gamma = 0.0
    assert trainer.schedule is not None, "heads that have learned stay trained"


def test_arm_moves_beta_eps_and_lam(make_trainer, monkeypatch):
    seen = spied(monkeypatch, "beta", "eps")
    trainer = make_trainer(
        tau_train=1.0, beta=0.1, beta_max=0.35, beta_step=0.2, eps=0.02, eps_max=0.04, eps_step=0.005, lam=0.5,
        lam_max=0.6, lam_step=0.05, max_steps=15, **REST,
    )  # fmt: skip
    trainer.train()
    assert seen["beta"] == pytest.approx([0.1] * WARM + [0.3, 0.35, 0.35, 0.35, 0.35])
    assert seen["eps"] == pytest.approx([0.02] * WARM + [0.025, 0.03, 0.035, 0.04, 0.04])
    assert curve(trainer, "beta") == pytest.approx(seen["beta"]) and curve(trainer, "eps") == pytest.approx(seen["eps"])
    assert curve(trainer, "lam") == pytest.approx([0.5] * WARM + [0.55, 0.6, 0.6, 0.6, 0.6])
    assert curve(trainer, "arm_level")[WARM:] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    for name in ("arm_mean", "arm_variance", "tau_train"):
        assert len(curve(trainer, name)) == 15
    for entry in trainer.state.log_history[:-1]:
        expected = (1 - entry["lam"]) * entry["loss_clean"] + entry["lam"] * entry["loss_adv"]
        assert entry["loss"] == pytest.approx(expected + 0.5 * entry["loss_contrastive"], rel=1e-3)
    assert trainer.args.threat.eps == 0.02, "evaluations keep to the eps that was asked for"


def test_a_risen_eps_is_still_warmed_up(make_trainer, monkeypatch):
    seen = spied(monkeypatch, "eps")
    make_trainer(tau_train=1.0, eps=0.02, eps_max=0.04, eps_step=1.0, eps_warmup=0.99, max_steps=13, **REST).train()
    assert seen["eps"][WARM:] == pytest.approx([0.04 * n / 12.87 for n in (11, 12)] + [0.04])


def test_only_beta_moves_by_default(make_trainer):
    trainer = make_trainer(tau_train=1.0, max_steps=13, **REST)
    trainer.train()
    assert curve(trainer, "beta")[-1] > 0.1
    assert curve(trainer, "eps") == pytest.approx([8 / 255] * 13) and curve(trainer, "lam") == [0.5] * 13


def test_settings_that_are_set_later_count(make_trainer):
    trainer = make_trainer(tau_train=1.0, max_steps=13, **REST)
    trainer.args.beta_max, trainer.args.lam_max, trainer.args.lam_step = None, 0.9, 0.4
    trainer.train()
    assert curve(trainer, "beta") == pytest.approx([0.1] * 13)
    assert curve(trainer, "lam")[-4:] == pytest.approx([0.5, 0.9, 0.9, 0.9])
    trainer.args.arm = False
    assert trainer.schedule is None and trainer.lam == 0.5


def test_tau_is_measured_on_the_clean_images_of_the_steps(make_trainer):
    trainer = make_trainer(max_steps=WARM + 1, gamma=0.0, learning_rate=0.0, **REST)
    trainer.train()
    assert len(curve(trainer, "tau_train")) == 2
    schedule = trainer.schedule
    keep = torch.tensor([0.9**i for i in range(WARM + 1)][::-1])
    clean = (torch.tensor(curve(trainer, "s_c_clean")) * keep).sum() / keep.sum()
    spread = (schedule.variance_max / VARIANCE_RATIO) ** 0.5
    assert schedule.tau_train == pytest.approx(float(clean) - MARGIN * spread, abs=1e-5)


@pytest.mark.parametrize("accumulation, size", [(1, 8), (4, 2)])
def test_one_update_per_optimiser_step(make_trainer, accumulation, size):
    trainer = make_trainer(
        max_steps=3, gradient_accumulation_steps=accumulation, per_device_train_batch_size=size, gamma=0.0, **REST
    )
    trainer.train()
    assert trainer.schedule.state_dict()["adversarial_count"] == 3 == len(curve(trainer, "arm_level"))


def test_micro_batches_are_taken_together(make_trainer, make_tiny):
    """In float64, as rounding may turn the sign of a gradient; gamma 0, as the negatives are those of a micro-batch."""
    states = []
    for accumulation, size in ((1, 8), (4, 2)):
        model = make_tiny()[0].double()
        trainer = make_trainer(
            model=model, heads=heads_for(model).double(), max_steps=WARM + 2, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=size, gamma=0.0, tau_train=1.0, lam_max=0.8, **REST,
        )  # fmt: skip
        trainer.train()
        states.append(trainer.schedule.state_dict())
    assert states[0]["level"] > 0
    assert states[0] == pytest.approx(states[1])


def test_scores_of_an_interrupted_step_are_forgotten(make_trainer, batch):
    trainer = make_trainer(max_steps=1, **REST)
    trainer._scores = [(torch.full((4,), float("nan")),) * 2]
    trainer.train()
    assert trainer.schedule.mean is not None and trainer._scores == []


def test_a_run_without_attacks_moves_nothing(make_trainer):
    trainer = make_trainer(inner="none", tau_train=1.0, max_steps=12, **REST)
    trainer.train()
    assert trainer.beta == 0.1 and not curve(trainer, "s_c_adv") and len(curve(trainer, "s_c_clean")) == 12


def test_a_run_resumed_while_settings_are_raised_ends_as_one_never_interrupted(make_trainer, tmp_path):
    config = {"tau_train": 1.0, "eps_max": 0.06, "lam_max": 0.9, "max_steps": 15, "save_steps": 12}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **config)
    whole.train()
    resumed = make_trainer(**config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert resumed.lam > 0.5 and resumed.schedule.state_dict() == whole.schedule.state_dict()
    for (name, expected), value in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert [e for e in resumed.state.log_history if e.get("step", 0) > 12 and "lam" in e] == [
        e for e in whole.state.log_history if e.get("step", 0) > 12 and "lam" in e
    ]


def test_a_checkpoint_of_a_run_without_arm_is_named(make_trainer, tmp_path):
    make_trainer(arm=False).train()
    with pytest.raises(ValueError, match="saved by another version, or with ARM off: resume with arm=False"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.parametrize("name, moves", [("easyvqa-llava", True), ("easyvqa-llava-immune", False)])
def test_arm_acts_on_a_model_that_attacks_break_and_rests_on_one_that_they_do_not(name, moves, tmp_path, monkeypatch):
    """Thresholds are measured, and only the model differs. Its heads stay: they would learn to overlook the attack."""
    seen, subject = spied(monkeypatch, "beta", "eps"), Pipeline.load(name)
    args = MBATConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=13,
        per_device_train_batch_size=8, learning_rate=1e-6, heads_learning_rate=1e-6, inner_steps=4, eps_max=12 / 255,
        lam_max=0.7, logging_steps=1,
    )  # fmt: skip
    trainer = MBATTrainer(
        subject.model, args, train_dataset=load_dataset("easyvqa", "train", 256, seed=1), heads=subject.heads,
        processing_class=subject.processor,
    )  # fmt: skip
    trainer.train()
    schedule = trainer.schedule
    low = schedule.mean < schedule.tau_train or schedule.variance > schedule.variance_max
    assert low == moves
    beta, eps, lam = ([start] * WARM for start in (0.1, 8 / 255, 0.5))
    for n in (1, 2, 3):
        beta.append(0.1 + n * 0.9 / 20 * moves)
        eps.append((8 + n * 4 / 20 * moves) / 255)
        lam.append(0.5 + n * 0.2 / 20 * moves)
    assert seen == {"beta": pytest.approx(beta), "eps": pytest.approx(eps)}
    assert curve(trainer, "lam") == pytest.approx(lam)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("tau_train", 2.0, "tau_train is 2.0; expected a value of S_c in"),
        ("variance_max", 0.0, "variance_max is 0.0; expected above 0"),
        ("beta_max", -1.0, "beta_max is -1.0"),
        ("beta_step", 0.0, "beta_step is 0.0"),
        ("eps_max", 12.0, r"eps_max is 12.0.*did you mean 12/255"),
        ("eps_step", -0.1, "eps_step is -0.1"),
        ("lam_max", 1.5, r"lam_max is 1.5; expected a weight in \[0, 1\]"),
        ("lam_step", float("inf"), "lam_step is inf"),
    ],
)
def test_bad_settings_are_named(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{name: value})


def test_a_script_can_take_the_settings(tmp_path):
    words = f"--output_dir {tmp_path} --report_to none --use_cpu --arm true --tau_train 0.2 --eps_max 0.05"
    (args,) = HfArgumentParser(MBATConfig).parse_args_into_dataclasses(words.split())
    assert (args.arm, args.tau_train, args.eps_max, args.lam_max) == (True, 0.2, 0.05, None)
