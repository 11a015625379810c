"""How a model is measured, on one that answers right until it is attacked."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from cmai_fast.cmcv import Threshold
from cmai_fast.evaluation import runner as runners
from cmai_fast.evaluation.protocol import CURVE_EPS, measure, own_scores, worst_answers
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.metrics import rejection_accuracy, worst_case
from cmai_fast.threat import ThreatModel
from planted import ANY, planted

THREAT = ThreatModel("linf", 64 / 255)
PGD, APGD = AttackSpec("pgd", 4), AttackSpec("apgd", 4)


@pytest.fixture(scope="module")
def clean(subject, samples):
    return Runner(subject, samples).images(range(len(samples)))


@pytest.fixture(scope="module")
def swapped(subject, samples, clean):
    """For each sample's id a picture to which its question is answered wrong."""
    found = {}
    for sample in samples:
        said = subject.generate([sample] * 12, clean)
        found[sample.id] = clean[next(j for j in reversed(range(12)) if said[j] != sample.answer)][0]
    return found


@pytest.fixture
def bare(subject):
    """The same model without heads."""
    other = copy.copy(subject)
    other.heads = other.threshold = None
    return other


def some(images, *places):
    return {id_: image for i, (id_, image) in enumerate(images.items()) if i in places}


def test_the_fitted_model_is_right_and_breaks(subject, samples):
    measured = measure(subject, samples, THREAT, [PGD], curve=PGD)
    record = measured.record
    assert record["acc_clean"] == 1.0 and record["acc_robust"] < 0.5 and record["asr"] == 1 - record["acc_robust"]
    assert record["acc_robust_8bit"] <= 1 and record["n"] == 12
    low, high = record["acc_robust_interval"]
    assert 0 <= low <= record["acc_robust"] <= high <= 1
    assert [p["eps"] for p in record["curve"]] == sorted({*CURVE_EPS, THREAT.eps})
    assert record["curve"][0]["acc_robust"] > record["curve"][-1]["acc_robust"] == record["acc_robust"]
    for point in record["curve"]:
        assert point["score"]["low"] <= point["score"]["mean"] <= point["score"]["high"]
        assert 0 <= point["fooled_and_accepted"] <= 1 - point["acc_robust"]
    own_radius = next(p for p in record["curve"] if p["eps"] == THREAT.eps)
    assert own_radius["score"]["mean"] == pytest.approx(measured.attacked["pgd-4"].scores.mean())
    images, own = measured.attacked["pgd-4"].images, measured.runner.images(range(12))
    assert 0 < max((images[i] - own[i]).abs().max() for i in range(12)) <= THREAT.eps + 1e-6


def test_verdicts_are_those_of_the_generated_text(subject, samples):
    measured = measure(subject, samples, THREAT, [PGD], batch_size=5)
    assert measured.clean.predictions == [s.answer for s in samples]
    attacked = measured.attacked["pgd-4"]
    said = subject.generate(samples, [attacked.images[i] for i in range(12)])
    assert attacked.predictions == said
    assert attacked.right.tolist() == [a == s.answer for a, s in zip(said, samples, strict=True)]
    assert attacked.right.any() and not attacked.right.all()
    assert (attacked.right == ~attacked.fooled).all()  # the fast stop agrees where one answer is right


def test_robust_means_under_the_worst_attack_and_what_is_broken_is_attacked_no_more(
    bare, samples, swapped, monkeypatch
):
    ids = [s.id for s in samples]
    first = planted(monkeypatch, "pgd", some(swapped, 0, 1, 2))
    second = planted(monkeypatch, "apgd", some(swapped, 2, 3, 4))
    record = measure(bare, samples, ANY, [AttackSpec("pgd", 4, 2), APGD], batch_size=5).record
    assert [i for part in first for i in part] == ids and [i for part in second for i in part] == ids[3:]
    assert record["acc_robust"] == record["acc_robust_8bit"] == pytest.approx(7 / 12)
    assert record["asr"] == pytest.approx(5 / 12)
    pgd, apgd = record["attacks"].values()
    assert (pgd["attacked"], pgd["broken"], pgd["asr"]) == (12, 3, pytest.approx(3 / 12))
    assert (apgd["attacked"], apgd["broken"], apgd["asr"]) == (9, 2, pytest.approx(2 / 9))
    assert (pgd["acc_robust"], apgd["acc_robust"]) == (pytest.approx(9 / 12), pytest.approx(7 / 12))
    assert pgd["passes"] == {"forward": 12, "backward": 0} and apgd["passes"]["forward"] == 8  # three batches, two


def test_numbers_are_those_of_attacking_everything(subject, samples):
    """Every sample by every attack, and then the worst: the same, up to nothing, since starts go by sample."""
    subject = copy.copy(subject)
    subject.threshold = Threshold(float(np.quantile(own_scores(subject, samples, 12), 0.2)), 0.2, 12, "calibration")
    threat, suite = ThreatModel("linf", 40 / 255), [AttackSpec("fgsm"), AttackSpec("pgd", 2), AttackSpec("apgd", 3)]
    measured = measure(subject, samples, threat, suite, batch_size=5)
    every = Runner(subject, samples, batch_size=5)
    attacked = [every.attack(spec, threat, range(12)) for spec in suite]
    clean, tau = every.clean(), subject.threshold.tau
    record = measured.record
    assert record["acc_robust"] == worst_case(clean.right, *(a.right for a in attacked)).mean()
    assert record["acc_robust_8bit"] == worst_case(clean.right, *(a.right_8bit for a in attacked)).mean()
    assert record["detection"]["acc_robust_with_rejection"] == rejection_accuracy(
        clean.right, clean.scores >= tau, *((a.right, a.scores >= tau) for a in attacked)
    )
    counts = [a["attacked"] for a in record["attacks"].values()]
    assert counts[0] == 12 > counts[-1] > 0


def test_a_broken_sample_stays_while_a_number_may_still_change(subject, samples, swapped, monkeypatch):
    """One whose attacked image the detector rejects, and one whose 8-bit image is still answered right."""
    subject, ids = copy.copy(subject), [s.id for s in samples]
    planted(monkeypatch, "pgd", swapped)
    second = planted(monkeypatch, "apgd", swapped)
    subject.threshold = Threshold(1.0, 0.05, 100, "calibration")  # rejects everything
    assert measure(subject, samples, ANY, [PGD, APGD]).record["attacks"]["apgd-4"]["attacked"] == 12
    subject.threshold = None
    monkeypatch.setattr(runners, "round_to_8bit", lambda adv, clean, threat: clean)
    record = measure(subject, samples, ANY, [PGD, APGD]).record
    assert (record["acc_robust"], record["acc_robust_8bit"]) == (0.0, 1.0) and second[-1] == ids


def test_what_the_fast_stop_takes_for_fooled_stands_while_the_text_is_right(bare, samples, monkeypatch):
    planted(monkeypatch, "pgd", {}, claims={s.id for s in samples})
    second = planted(monkeypatch, "apgd", {})
    measured = measure(bare, samples, ANY, [PGD, APGD])
    assert measured.attacked["pgd-4"].fooled.all() and measured.record["acc_robust"] == 1.0
    assert len(second[0]) == 12


def test_an_attack_moves_away_from_the_models_own_right_answer(bare, samples):
    """With another reference first, the fast stop would take every clean answer for wrong, and attack nothing."""
    several = [replace(s, references=("yes", s.answer)) for s in samples]
    one, two = (measure(bare, given, THREAT, [PGD]) for given in (samples, several))
    assert two.record["acc_clean"] == 1.0
    assert two.attacked["pgd-4"].predictions == one.attacked["pgd-4"].predictions
    assert two.record["acc_robust"] == one.record["acc_robust"] < 0.5


def test_what_is_wrong_when_untouched_is_not_attacked(bare, samples, monkeypatch):
    seen = planted(monkeypatch, "pgd", {})
    wrong = [replace(s, references=("yes",)) if i < 4 else s for i, s in enumerate(samples)]
    measured = measure(bare, wrong, THREAT, [PGD])
    record = measured.record
    assert record["acc_clean"] == record["acc_robust"] == pytest.approx(8 / 12) and record["asr"] == 0
    assert seen == [[s.id for s in samples[4:]]] and measured.attacked["pgd-4"].rows == list(range(4, 12))


def test_nothing_is_right_and_so_nothing_attacked(subject, samples):
    record = measure(subject, [replace(s, references=("yes",)) for s in samples[:3]], THREAT, [PGD, APGD]).record
    assert record["acc_clean"] == record["acc_robust"] == 0 and record["asr"] is None
    assert record["attacks"]["pgd-4"]["attacked"] == 0 and record["attacks"]["pgd-4"]["asr"] is None


def test_transferred_images_join_the_suite(bare, samples, clean, swapped, monkeypatch):
    planted(monkeypatch, "pgd", some(swapped, 0, 1))
    images = {i: swapped[samples[i].id][None] for i in (1, 2)}  # others keep their own
    measured = measure(bare, samples, ANY, [PGD], transferred={"transfer": images}, batch_size=5)
    record, transfer = measured.record, measured.record["attacks"]["transfer"]
    assert measured.attacked["transfer"].right.tolist() == [i not in (1, 2) for i in range(12)]
    assert (transfer["attacked"], transfer["broken"]) == (12, 2)  # on all, so that it can be compared
    assert record["acc_robust"] == transfer["acc_robust"] == pytest.approx(9 / 12)
    assert "passes" not in transfer


def test_scores_and_detector(subject, samples, clean, swapped, monkeypatch):
    """A detector that sees every attacked image: scores are planted."""
    untouched = torch.cat(clean)

    def score(part, answers, images):
        return torch.tensor([0.9 if (untouched == x).flatten(1).all(1).any() else -0.5 for x in images])

    subject = copy.copy(subject)
    subject.score = score
    moved = {k: (image * 255 - 1).clamp(0, 255) / 255 for k, image in swapped.items()}
    planted(monkeypatch, "pgd", some(moved, *range(6)))
    record = measure(subject, samples, ANY, [PGD], batch_size=5).record
    s_c, detection = record["s_c"], record["detection"]
    assert s_c["clean"]["mean"] == pytest.approx(0.9) and s_c["adversarial"]["mean"] == pytest.approx(0.2)
    assert s_c["attack"] == "pgd-4" and sum(s_c["clean"]["histogram"]["counts"]) == 12
    assert len(s_c["clean"]["histogram"]["edges"]) == 41
    assert (detection["auroc"], detection["auroc_successful"]) == (0.75, 1.0)
    assert detection["acc_robust_with_rejection"] == 1.0 > record["acc_robust"] == 0.5
    successful = detection["successful"]["pgd-4"]
    assert (successful["n"], successful["auroc"], successful["tpr_at_1_fpr"]) == (6, 1.0, 1.0)
    assert successful["roc"]["tpr"][-1] == 1.0 and len(successful["roc"]["fpr"]) == len(successful["roc"]["tpr"])
    assert detection["threshold"] == 0.0 and detection["clean_rejection_rate"] == 0.0


def test_own_scores_use_the_models_own_answers(subject, samples, clean):
    scores = own_scores(subject, samples, 5)
    assert scores.shape == (12,) and scores.dtype == np.float64
    answers = subject.generate(samples, clean)
    closed = subject.collate([replace(s, references=(a,)) for s, a in zip(samples, answers, strict=True)])
    texts = {k: closed[k] for k in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        h_v = subject.bridge.encode_image(subject.space.to_model(torch.cat(clean)))
        h_t = subject.bridge.encode_text(**texts)
        expected = subject.heads.score(subject.heads.project_image(h_v), subject.heads.project_text(h_t))
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(own_scores(subject, samples, 12, clean), expected.numpy(), atol=1e-5)
    assert np.allclose(measure(subject, samples, THREAT, []).clean.scores, scores, atol=1e-5)


def test_without_heads_or_attacks_nothing_is_said_of_detection(subject, bare, samples, monkeypatch):
    assert "detection" not in measure(subject, samples, THREAT, []).record
    planted(monkeypatch, "pgd", {})
    record = measure(bare, samples, THREAT, [PGD]).record
    assert "detection" not in record and "s_c" not in record


def test_corpus_metrics_are_of_clean_and_of_the_worst_texts(bare, samples, swapped, monkeypatch):
    planted(monkeypatch, "pgd", some(swapped, 0, 1, 2))
    measured = measure(bare, samples, ANY, [PGD])
    assert measured.record["metrics"] == {"clean": {"exact-match": 1.0}, "robust": {"exact-match": 0.75}}
    worst = worst_answers(measured)
    assert worst[3:] == [s.answer for s in samples[3:]] and all(
        a != s.answer for a, s in zip(worst[:3], samples[:3], strict=True)
    )
    assert measured.record["task"] == "vqa"


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_results_do_not_depend_on_the_batch_size(subject, samples, name):
    spec, threat = AttackSpec(name, 3), ThreatModel("linf", 8 / 255)
    runs = [Runner(subject, samples, batch_size=b).attack(spec, threat, keep=True) for b in (12, 5)]
    assert runs[0].predictions == runs[1].predictions and runs[0].predictions_8bit == runs[1].predictions_8bit
    runner = Runner(subject, samples, seed=1)
    other = runner.attack(spec, threat, keep=True)
    assert not all(torch.equal(other.images[i], runs[0].images[i]) for i in range(12))


def test_what_is_untouched_is_not_generated_again(bare, samples, swapped, monkeypatch):
    planted(monkeypatch, "pgd", some(swapped, 3, 7))
    asked = []
    generate = type(bare).generate
    monkeypatch.setattr(type(bare), "generate", lambda s, x, *a: asked.append(len(x)) or generate(s, x, *a))
    measure(bare, samples, ANY, [PGD])
    assert sum(asked) == 12 + 2  # the 8-bit images are the same ones


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


def test_l2_has_a_curve_of_its_own(bare, samples):
    record = measure(bare, samples[:4], ThreatModel("l2", 4.0), [PGD], curve=AttackSpec("pgd", 1)).record
    assert [p["eps"] for p in record["curve"]] == [0.5, 1, 2, 4, 6, 8]


def test_bad_specs(bare, samples):
    with pytest.raises(ValueError, match="unknown attack 'squares'"):
        AttackSpec("squares", 10)
    with pytest.raises(ValueError, match="steps is -1"):
        AttackSpec("pgd", -1)
    with pytest.raises(ValueError, match="restarts is 0"):
        AttackSpec("apgd", 5, 0)
    with pytest.raises(ValueError, match="has no setting 'stepsize'"):
        AttackSpec("pgd", settings={"stepsize": 1})
    with pytest.raises(ValueError, match="pgd-4 twice"):
        measure(bare, samples, THREAT, [PGD, PGD])
    with pytest.raises(ValueError, match="no samples"):
        measure(bare, [], THREAT, [PGD])
    with pytest.raises(ValueError, match="batch_size is 0"):
        measure(bare, samples, THREAT, [PGD], batch_size=0)


def test_settings_of_an_attack_are_passed_and_named(bare, samples):
    spec = AttackSpec("pgd", 2, settings={"step_size": "0"})
    assert spec.key == "pgd-2[step_size=0.0]"
    measured = measure(bare, samples[:3], ThreatModel("linf", 0.0), [spec])
    assert measured.record["attacks"][spec.key]["settings"] == {"step_size": 0.0}
