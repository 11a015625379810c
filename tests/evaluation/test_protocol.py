"""How a model is measured, on one that answers right until it is attacked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cmai_fast.attacks import ATTACKS, AttackResult, Passes
from cmai_fast.evaluation import protocol
from cmai_fast.evaluation.protocol import CURVE_EPS, AttackSpec, clean_verdicts, measure, own_scores, run_attack
from cmai_fast.threat import ThreatModel

THREAT = ThreatModel("linf", 64 / 255)
PGD, APGD = AttackSpec("pgd", 4), AttackSpec("apgd", 4)


@pytest.fixture(scope="module")
def clean(subject, samples):
    return clean_verdicts(subject, samples, 5, False)[0]


def planted(monkeypatch, name, fools):
    """An attack that moves nothing and claims to fool the sample ids in `fools`."""

    def attack(objective, clean, threat, *, steps, restarts, seed, sample_ids):
        fooled = torch.tensor([int(i) in fools for i in sample_ids])
        clear = torch.zeros(len(clean), dtype=torch.int64)
        return AttackResult(clean.clone(), fooled, torch.zeros(len(clean)), Passes(full_forward=steps), clear)

    monkeypatch.setitem(ATTACKS, name, attack)


def test_the_fitted_model_is_right_and_breaks(subject, samples):
    measured = measure(subject, samples, THREAT, [PGD], curve=PGD)
    record = measured.record
    assert record["acc_clean"] == 1.0 and record["acc_robust"] < 0.5 and record["asr"] == 1 - record["acc_robust"]
    assert record["acc_robust_8bit"] <= 1 and record["n"] == 12
    low, high = record["acc_robust_interval"]
    assert 0 <= low <= record["acc_robust"] <= high <= 1
    assert [p["eps"] for p in record["curve"]] == sorted({*CURVE_EPS, THREAT.eps})
    assert record["curve"][0]["acc_robust"] > record["curve"][-1]["acc_robust"] == record["acc_robust"]
    moved = [(a - c).abs().max() for a, c in zip(measured.attacked["pgd-4"].adv, measured.clean, strict=True)]
    assert 0 < max(moved) <= THREAT.eps + 1e-6


def test_verdicts_are_those_of_greedy_generation(subject, samples, clean):
    answers = subject.generate(samples, clean)
    assert answers == [s.answer for s in samples]
    adv = run_attack(subject, samples, PGD, THREAT).adv
    objective = subject.objective(subject.collate(samples))
    right = [a == s.answer for a, s in zip(subject.generate(samples, adv), samples, strict=True)]
    assert subject.right(objective.join(adv), objective).tolist() == right and not all(right)


def test_robust_means_under_the_worst_attack(subject, samples, monkeypatch):
    ids = [s.id for s in samples]
    planted(monkeypatch, "pgd", set(ids[:3]))
    planted(monkeypatch, "apgd", set(ids[2:5]))
    record = measure(subject, samples, THREAT, [AttackSpec("pgd", 4, 2), APGD], batch_size=5).record
    assert record["acc_robust"] == pytest.approx(7 / 12) and record["asr"] == pytest.approx(5 / 12)
    assert record["attacks"]["pgd-4x2"]["acc_robust"] == pytest.approx(9 / 12)
    assert record["attacks"]["apgd-4"]["acc_robust"] == pytest.approx(9 / 12)
    assert record["attacks"]["apgd-4"]["passes"] == {"forward": 12, "backward": 0}  # three batches
    # The images are in truth untouched, so their 8-bit versions are judged for themselves.
    assert record["acc_robust_8bit"] == 1.0


def test_what_is_wrong_when_untouched_is_not_robust(subject, samples, monkeypatch):
    planted(monkeypatch, "pgd", set())
    wrong = [replace(s, references=("yes",)) if i < 4 else s for i, s in enumerate(samples)]
    record = measure(subject, wrong, THREAT, [PGD]).record
    assert record["acc_clean"] == record["acc_robust"] == pytest.approx(8 / 12) and record["asr"] == 0


def test_transferred_images_join_the_suite(subject, samples, clean, monkeypatch):
    planted(monkeypatch, "pgd", set())
    images = clean[5::-1] + clean[6:]  # pictures of other colours
    with pytest.MonkeyPatch.context() as patch:  # they are outside any ball
        patch.setattr(protocol, "round_to_8bit", lambda adv, clean, threat: clean)
        record = measure(subject, samples, THREAT, [PGD], transferred={"transfer": images}, batch_size=5).record
    right = [a == s.answer for a, s in zip(subject.generate(samples, images), samples, strict=True)]
    assert record["acc_robust"] == record["attacks"]["transfer"]["acc_robust"] == pytest.approx(np.mean(right))
    assert not all(right)
    assert record["acc_robust_8bit"] == 1.0
    assert "passes" not in record["attacks"]["transfer"]


def test_scores_and_detector(subject, samples, monkeypatch):
    """A detector that sees every attacked image: scores are planted."""
    monkeypatch.setattr(type(subject), "own_scores", lambda s, images, part: (
        torch.where((torch.cat(images) - clean_of(images)).abs().amax((1, 2, 3)) < 1e-3, 0.9, -0.5), []))  # fmt: skip
    originals = torch.cat(clean_verdicts(subject, samples, 12, False)[0])

    def clean_of(images):
        return originals[: len(images)] if len(images) == 12 else originals

    record = measure(subject, samples, THREAT, [PGD], batch_size=12).record
    s_c, detection = record["s_c"], record["detection"]
    assert s_c["clean"]["mean"] == pytest.approx(0.9) and s_c["adversarial"]["mean"] == pytest.approx(-0.5)
    assert s_c["attack"] == "pgd-4" and sum(s_c["clean"]["histogram"]["counts"]) == 12
    assert len(s_c["clean"]["histogram"]["edges"]) == 41
    assert detection["auroc"] == detection["tpr_at_1_fpr"] == detection["acc_robust_with_rejection"] == 1.0
    assert detection["threshold"] == 0.0 and detection["clean_rejection_rate"] == 0.0


def test_own_scores_use_the_models_own_answers(subject, samples, clean):
    scores = own_scores(subject, samples, clean, 5)
    assert scores.shape == (12,) and scores.dtype == np.float64
    answers = subject.generate(samples, clean)
    closed = subject.collate([replace(s, references=(a,)) for s, a in zip(samples, answers, strict=True)])
    texts = {k: closed[k] for k in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        h_v, h_t = (
            subject.bridge.encode_image(subject.space.to_model(torch.cat(clean))),
            subject.bridge.encode_text(**texts),
        )
        expected = subject.heads.score(subject.heads.project_image(h_v), subject.heads.project_text(h_t))
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


def test_without_heads_or_attacks_nothing_is_said_of_detection(subject, samples, monkeypatch):
    assert "detection" not in measure(subject, samples, THREAT, []).record
    monkeypatch.setattr(subject, "heads", None)
    planted(monkeypatch, "pgd", set())
    record = measure(subject, samples, THREAT, [PGD]).record
    assert "detection" not in record and "s_c" not in record


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_results_do_not_depend_on_the_batch_size(subject, samples, name):
    runs = [
        run_attack(subject, samples, AttackSpec(name, 3), ThreatModel("linf", 8 / 255), batch_size=b) for b in (12, 5)
    ]
    assert runs[0].right.tolist() == runs[1].right.tolist()
    assert runs[0].right_8bit.tolist() == runs[1].right_8bit.tolist()
    other = run_attack(subject, samples, AttackSpec(name, 3), ThreatModel("linf", 8 / 255), seed=1)
    assert not torch.equal(torch.cat(other.adv), torch.cat(runs[0].adv))


def test_measuring_leaves_the_model_as_it_was(subject, samples):
    weights = list(subject.model.parameters())
    modules = list(subject.model.modules())
    modules[3].training = True
    weights[0].requires_grad_(False)
    rng = torch.get_rng_state()
    try:
        measure(subject, samples, THREAT, [PGD])
        assert [m.training for m in modules] == [i == 3 for i in range(len(modules))]
        assert [p.requires_grad for p in weights] == [i != 0 for i in range(len(weights))]
        assert all(p.grad is None for p in weights)
        assert torch.equal(torch.get_rng_state(), rng)
    finally:
        modules[3].training = False
        weights[0].requires_grad_(True)


def test_l2_has_a_curve_of_its_own(subject, samples):
    record = measure(subject, samples[:4], ThreatModel("l2", 4.0), [PGD], curve=PGD).record
    assert [p["eps"] for p in record["curve"]] == [0.5, 1, 2, 4, 6, 8]


def test_bad_specs():
    with pytest.raises(ValueError, match="unknown attack 'square'; known: fgsm, pgd, mi-fgsm, apgd"):
        AttackSpec("square", 10)
    with pytest.raises(ValueError, match="steps of pgd is 0"):
        AttackSpec("pgd", 0)
    with pytest.raises(ValueError, match="restarts of apgd is 0"):
        AttackSpec("apgd", 5, 0)
