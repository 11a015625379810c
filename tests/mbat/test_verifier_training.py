"""MBATTrainer with a verifier: S_c, the contrastive loss, checkpoints, parts, evaluation."""

from __future__ import annotations

import copy

import pytest
import torch

from cmai_fast.attacks import Passes, Victim
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.mbat import MBATConfig, MBATTrainer, last_checkpoint
from cmai_fast.mbat.drift import squared_distance
from cmai_fast.mbat.passes import consistency_passes
from cmai_fast.mbat.verifier import INNER_STEPS, inconsistent
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel

SIZES = {"hidden": 16, "width": 16, "dim": 8, "heads": 2}


@pytest.fixture(scope="module")
def data():
    """Questions about few pictures."""
    return load_dataset("easyvqa", "train")[:24]


@pytest.fixture
def trained_by(make_tiny, data, tmp_path):
    """`trained_by(given=None, heads=None, **config)`: a trainer with a verifier, which has not run yet."""

    def make(given=None, heads=None, out="out", **config):
        model, processor = make_tiny()
        verifier = heads or Verifier.for_data(model, processor, data, **SIZES)
        settings = {
            "output_dir": str(tmp_path / out), "inner_steps": 2, "max_steps": 2, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "gamma": 0.5, "beta": 0.3, "logging_steps": 1, "save_steps": 1, "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "seed": 3,
        }  # fmt: skip
        return MBATTrainer(
            model, MBATConfig(**(settings | config)), train_dataset=data, processing_class=processor, heads=verifier,
            **(given or {}),
        )  # fmt: skip

    return make


def weights(trainer):
    return {
        **{k: v.detach().clone() for k, v in trainer.model.state_dict().items()},
        **{f"cmcv.{k}": v.detach().clone() for k, v in trainer.heads.state_dict().items()},
    }


def frozen(verifier):
    """As a verifier is loaded."""
    verifier.network.requires_grad_(False)
    return verifier


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_with_the_model_and_its_loss_moves_the_vision_side(trained_by):
    trainer = trained_by(max_steps=3)
    before = weights(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss_contrastive" in entry]
    assert len(logs) == 3 and all(0 < entry["s_c_adv"] <= 1 and 0 < entry["s_c_clean"] <= 1 for entry in logs)
    after = weights(trainer)
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert {k for k in after if k.startswith("cmcv.")} - moved <= {"cmcv.logit_scale"}
    assert trainer.passes.text_forward == 0, "the language model reads no text for it"
    assert trained_by(heads=frozen(trainer.verifier)).heads.logit_scale.requires_grad
    assert not trained_by(heads=frozen(trainer.verifier), gamma=0.0).heads.logit_scale.requires_grad

    plain = trained_by(max_steps=3, gamma=0.0, beta=0.0, arm=False, out="plain")
    plain.train()
    assert not equal({k: after[k] for k in weights(plain) if "vision" in k}, {
        k: v for k, v in weights(plain).items() if "vision" in k
    })  # fmt: skip


def test_the_loss_is_that_of_all_statements_of_both_views(trained_by, data):
    trainer = trained_by(beta=0.0)
    trainer.create_optimizer()
    inputs = trainer.data_collator([data[i] for i in range(4)])
    assert inputs["statement_ids"].shape[1] > 1, "the data ask several questions about a picture"
    parts, _ = trainer._step({**inputs, "sample_ids": torch.arange(4)}, 4)
    verifier, bridge = trainer.verifier, trainer.bridge
    with torch.no_grad():
        features = bridge.encode_image(inputs["pixel_values"])
        clean = verifier.log_p(features, verifier.read(inputs))
    torch.testing.assert_close(parts["s_c_clean"], clean.exp(), rtol=1e-4, atol=1e-6)
    expected = -(clean.mean() + parts["s_c_adv"].log().mean()) / 2
    torch.testing.assert_close(parts["loss_contrastive"], expected, rtol=1e-4, atol=1e-5)


def test_beta_makes_images_less_consistent(trained_by, data):
    scores = {}
    for beta in (0.0, 3.0):
        trainer = trained_by(beta=beta, eps=32 / 255, inner_steps=6, arm=False)
        inputs = trainer.data_collator([data[i] for i in range(8)])
        trainer.create_optimizer()
        parts, _ = trainer._step({**inputs, "sample_ids": torch.arange(8)}, 8)
        scores[beta] = parts["s_c_adv"].mean()
    assert scores[3.0] < scores[0.0]


def test_a_step_in_parts_is_the_whole_step(trained_by, data):
    grads = []
    for size in (6, 2):
        trainer = trained_by(inner_steps=1)
        trainer.create_optimizer()
        inputs = trainer.data_collator([data[i] for i in range(6)])
        trainer._step({**inputs, "sample_ids": torch.arange(6)}, size)
        grads.append({k: p.grad for k, p in [*trainer.model.named_parameters(), *trainer.heads.named_parameters()]})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("anchor", [0.0, 2.0])
def test_a_consistency_step_runs_the_vision_side_alone(trained_by, data, anchor):
    trainer = trained_by(consistency_steps=2, max_steps=6, anchor=anchor)
    trainer.create_optimizer()
    vision = {id(p) for p in trainer.bridge.vision_parameters}
    inputs = trainer.data_collator([data[i] for i in range(4)])
    for step, alone in enumerate((False, True, True, False)):
        trainer.state.global_step, before = step, copy.copy(trainer.passes)
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, dict(inputs))
        assert (trainer.passes.full_forward == before.full_forward) is alone
        learning = {id(p) for p in trainer.model.parameters() if p.grad is not None and p.grad.any()}
        assert learning & vision and bool(learning - vision) is not alone
        if alone:  # the attack, and the adversarial branch
            assert trainer.passes == before + consistency_passes(anchor).total
            assert consistency_passes(anchor).total == Passes(0, 0, INNER_STEPS + 1 + bool(anchor), INNER_STEPS + 1)


@pytest.mark.parametrize("anchor", [0.0, 2.0])
def test_consistency_steps_are_logged_resumed_and_done_in_parts(trained_by, data, tmp_path, anchor):
    settings = {"consistency_steps": 1, "anchor": anchor}
    whole = trained_by(max_steps=4, save_steps=3, **settings)
    whole.train()
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert ["loss_consistency" in entry for entry in logs] == [False, True, False, True]
    assert ["loss_drift" in entry for entry in logs] == [False, anchor > 0, False, anchor > 0]
    assert ["loss_clean" in entry for entry in logs] == [True, False, True, False]
    for entry in logs:
        if "loss_consistency" in entry:
            whole_loss = entry["loss_consistency"] + anchor * entry.get("loss_drift", 0.0)
            assert entry["loss"] == pytest.approx(whole_loss, rel=1e-4)
    resumed = trained_by(max_steps=4, save_steps=3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert equal(weights(whole), weights(resumed))
    grads = []
    for size in (6, 4):
        trainer = trained_by(**settings)
        trainer.create_optimizer()
        trainer.state.global_step = 1
        trainer._step({**trainer.data_collator([data[i] for i in range(6)]), "sample_ids": torch.arange(6)}, size)
        grads.append({k: p.grad for k, p in trainer.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1])
def test_where_the_verifier_does_not_fit_a_step_runs_in_parts(trained_by, data, monkeypatch, step):
    grads = []
    for fits in (True, False):
        trainer = trained_by(consistency_steps=1, anchor=1.0)
        trainer.create_optimizer()
        trainer.state.global_step, verify = step, trainer._verify
        inputs = {**trainer.data_collator([data[i] for i in range(6)]), "sample_ids": torch.arange(6)}

        def scarce(parts, verify=verify):
            if max(len(part.views[0].leaf) for part in parts) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return verify(parts)

        if fits:
            trainer.training_step(trainer.model, inputs)
        else:
            monkeypatch.setattr(trainer, "_verify", scarce)
            with pytest.warns(RuntimeWarning, match="takes at most 3 at once"):
                trainer.training_step(trainer.model, inputs)
        learned = [*trainer.model.named_parameters(), *trainer.heads.named_parameters()]
        grads.append({k: p.grad for k, p in learned if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6)


def test_an_anchor_keeps_features_where_they_were(trained_by, data):
    drift = {}
    for anchor in (0.0, 20.0):
        trainer = trained_by(consistency_steps=5, max_steps=12, learning_rate=1e-2, anchor=anchor)
        inputs = trainer.data_collator([data[i] for i in range(6)])
        with torch.no_grad():
            before = trainer.bridge.encode_image(inputs["pixel_values"])
        trainer.train()
        with torch.no_grad():
            drift[anchor] = squared_distance(trainer.bridge.encode_image(inputs["pixel_values"]), before).mean()
            if anchor:
                assert torch.equal(trainer._original.features(inputs["pixel_values"], {}), before)
    assert drift[20.0] < 0.7 * drift[0.0]


def test_an_attack_on_consistency_lowers_it_and_stays_in_the_ball(trained_by, data):
    trainer = trained_by()
    inputs = trainer.data_collator([data[i] for i in range(6)])
    victim, verifier = Victim(trainer.bridge, trainer.space, inputs), trainer.verifier
    clean, texts = victim.pixels(), verifier.read(inputs)
    found = inconsistent(verifier, victim, texts, clean, ThreatModel("linf", 16 / 255), 5, seed=0)
    assert (found.adv - clean).abs().max() <= 16 / 255 + 1e-6 and found.adv.min() >= 0 and found.adv.max() <= 1
    with torch.no_grad():
        before, after = (
            verifier.log_p(victim.encode(x), texts) for x in (victim.space.to_model(clean), found.model_input)
        )
    assert (after < before).all()
    assert found.passes.full_forward == 0 and found.passes.vision_backward == 5
    assert all(p.requires_grad for p in trainer.heads.parameters()), "given back"


def test_it_is_saved_resumed_and_used_by_a_pipeline(trained_by, tmp_path):
    whole = trained_by(max_steps=4, save_steps=2)
    whole.train()
    resumed = trained_by(max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert equal(weights(whole), weights(resumed))
    whole.save_model(str(tmp_path / "model"))
    whole.processing_class.save_pretrained(tmp_path / "model")
    pipeline = Pipeline.load(tmp_path / "model")
    assert pipeline.heads is None and pipeline.verifier is not None
    assert equal(pipeline.verifier.network.state_dict(), whole.heads.state_dict())
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-4"


def test_an_evaluation_reports_its_score(trained_by, data):
    trainer = trained_by(given={"eval_dataset": [data[i] for i in range(6)]}, eval_attack_steps=1)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_robust_s_c"] <= 1 and 0 < metrics["eval_s_c"] <= 1
    plain = trained_by(
        given={"eval_dataset": [data[i] for i in range(6)], "data_collator": VQACollator(trainer.processing_class)},
        eval_attack_steps=1,
    )
    assert "eval_s_c" not in plain.evaluate(), "batches without statements have no score"


def test_what_does_not_fit_is_refused(trained_by, make_tiny, data):
    model, processor = make_tiny()
    verifier = Verifier.for_data(model, processor, data, **SIZES)
    verifier.tower = copy.copy(model)
    with pytest.raises(ValueError, match="a tower of its own, which training would not change"):
        trained_by(heads=verifier)
    plain = trained_by(given={"data_collator": VQACollator(processor)})
    with pytest.raises(ValueError, match="no statement_ids, which a verifier learns from"):
        plain.train()
    with pytest.raises(ValueError, match="consistency_steps is 2, and heads is no Verifier"):
        trained_by(heads=ConsistencyHeads(32, 32), consistency_steps=2)
    with pytest.raises(ValueError, match=r"consistency_steps is 0 and anchor 1.0; expected .* above 0, or anchor 0"):
        trained_by(anchor=1.0)
    later = trained_by(consistency_steps=2)
    later.args.anchor = 0.5
    with pytest.raises(ValueError, match=r"anchor was 0 when the trainer was made.* and is 0.5 now; set it before"):
        later.train()
    frozen_vision = trained_by(consistency_steps=2)
    for p in frozen_vision.bridge.vision_parameters:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the vision side learns"):
        frozen_vision.train()
    for said in ([], [("q?", ("yes",))]):
        with pytest.raises(ValueError, match=r"sample \d+ has the statements \[.*right answer and a wrong one"):
            VQACollator(processor, statements=lambda s, said=said: said)([data[0]])
    with pytest.raises(ValueError, match="consistency_steps is -1; expected at least 0"):
        trained_by(consistency_steps=-1)
    batch = plain.data_collator([data[0]])
    batch |= {"statement_ids": torch.zeros(1, 2, 3, dtype=torch.long), "statement_answers": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match=r"statement_ids has shape \(1, 2, 3\).*expected \(N, S, K, L\)"):
        plain.training_step(plain.model, batch)
