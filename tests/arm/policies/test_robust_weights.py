from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from cmai_fast.arm import Guard
from cmai_fast.arm.policies import RobustWeights
from cmai_fast.arm.policies.policy import decide
from cmai_fast.arm.policies.robust_weights import Weights
from cmai_fast.models.loading import load_model
from cmai_fast.pipeline import Pipeline

IMMUNE = "easyvqa-llava-immune"


@pytest.fixture(scope="module")
def immune():
    return Pipeline.load(IMMUNE)


def weights_of(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("how", [{}, {"check": True}, {"alpha": None}, {"alpha": 0.5}])
def test_more_right_answers_than_the_attacked_model(attacked, state, how):
    pipeline = attacked.cases[0].pipeline
    model, bound = pipeline.model, RobustWeights(IMMUNE, **how).bind(pipeline)
    before, bits = state(model), weights_of(model)
    decisions = decide(bound, attacked.cases)
    assert attacked.brought_back(decisions) >= 5
    assert state(model) == before and same(weights_of(model), bits)


def test_alpha_1_answers_as_the_immunised_model_does(attacked, immune):
    samples = [case.sample for case in attacked.cases]
    answers, scores = immune.answer(samples)
    decisions = attacked.ask(RobustWeights(IMMUNE))
    assert [d.answer for d in decisions] == answers
    checked = attacked.ask(RobustWeights(IMMUNE, check=True))
    for decision, score in zip(checked, scores, strict=True):
        assert (decision is not None) == (score >= immune.threshold.tau)
        assert decision is None or decision.details["score"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_inside_the_weights_are_the_mixture_and_afterwards_the_same_bits(make_tiny, state, alpha):
    model, robust = make_tiny(0)[0], weights_of(make_tiny(1)[0])
    own, before = weights_of(model), state(model)
    weights = Weights(model, robust, "other")

    def use():
        with weights.switched(alpha):
            for key, value in weights_of(model).items():
                torch.testing.assert_close(value, (1 - alpha) * own[key] + alpha * robust[key], rtol=1e-5, atol=1e-6)
            if alpha == 1:
                assert same(weights_of(model), robust)
            raise KeyError("an exception inside")

    with pytest.raises(KeyError, match="an exception inside"):
        use()
    assert state(model) == before and same(weights_of(model), own)


def test_a_tied_weight_is_exchanged_once_and_equal_ones_are_not_held(make_tiny):
    model, other = make_tiny(0)[0], make_tiny(0)[0]
    for one, value in ((model, 0.0), (other, 1.0)):
        one.lm_head.weight = one.get_input_embeddings().weight
        with torch.no_grad():
            one.lm_head.weight.fill_(value)
    weights = Weights(model, other.state_dict(), "other")
    assert len(weights._exchanged) == 1
    with weights.switched(0.5):
        assert model.get_input_embeddings().weight is model.lm_head.weight
        assert bool((model.lm_head.weight == 0.5).all())
    assert bool((model.lm_head.weight == 0).all())


def test_alpha_by_score_grows_with_the_distance_below_the_threshold(attacked):
    bound = RobustWeights(IMMUNE, alpha=None, reach=0.4).bind(attacked.cases[0].pipeline)
    below = {0.001: 0.25, 0.1: 0.25, 0.11: 0.5, 0.25: 0.75, 0.4: 1.0, 1.5: 1.0, float("nan"): 1.0}
    cases = [replace(attacked.cases[0], threshold=0.0, score=-distance) for distance in below]
    assert [d.details["alpha"] for d in decide(bound, cases)] == list(below.values())


def test_by_default_alpha_is_1_four_log_odds_below_the_threshold(attacked):
    """The scores of a verifier are log-odds, with a tenth of whose range a cosine would be at its end."""
    bound = RobustWeights(IMMUNE, alpha=None).bind(attacked.cases[0].pipeline)
    assert attacked.cases[0].pipeline.verifier is not None
    cases = [replace(attacked.cases[0], threshold=0.0, score=-distance) for distance in (0.5, 1.5, 3.0, 4.0)]
    assert [d.details["alpha"] for d in decide(bound, cases)] == [0.25, 0.5, 0.75, 1.0]


def test_what_the_verifier_read_with_other_weights_is_forgotten(attacked):
    """The statements are read through the embeddings, which the weights exchange."""
    near, far = (
        [replace(case, threshold=0.0, score=-distance) for case in attacked.cases[:6]] for distance in (0.1, 9.0)
    )
    policy = RobustWeights(IMMUNE, alpha=None, check=True)
    one, other = policy.bind(attacked.cases[0].pipeline), policy.bind(attacked.cases[0].pipeline)
    first = decide(one, near), decide(one, far)
    second = decide(other, far), decide(other, near)
    assert any(d is not None for d in first[1])
    assert first[0] == second[1] and first[1] == second[0]


def test_threads_that_share_the_model_never_see_the_other_weights(attacked):
    pipeline = attacked.cases[0].pipeline
    samples = [case.sample for case in attacked.cases[:6]]
    plain = Guard(pipeline, threshold=-2.0)
    robust = Guard(pipeline, [RobustWeights(IMMUNE)], threshold=100.0)
    expected = [guard.decide_samples(samples) for guard in (plain, robust)]
    assert [d.answer for d in expected[0]] != [d.answer for d in expected[1]]
    start = threading.Barrier(4)

    def ask(thread):
        start.wait()
        return [(plain, robust)[thread % 2].decide_samples(samples) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for thread, answered in enumerate(pool.map(ask, range(4))):
            assert all(
                [d.answer for d in decisions] == [d.answer for d in expected[thread % 2]] for decisions in answered
            )


def test_a_switch_takes_milliseconds(bundled):
    weights = RobustWeights(IMMUNE).bind(bundled).weights
    times = []
    for _ in range(10):
        start = time.process_time()
        with weights.switched(0.5):
            pass
        times.append(time.process_time() - start)
    assert statistics.median(times) < 0.1  # about 3 ms, of this process alone


def test_a_folder_of_adapters_is_merged_into_its_base(make_tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = make_tiny(0)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base, _ = load_model(tmp_path / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    processor.save_pretrained(tmp_path / "lora")
    expected = adapted.merge_and_unload().state_dict()
    bound = RobustWeights(str(tmp_path / "lora")).bind(Pipeline("tiny", model, processor))
    assert len(bound.weights._exchanged) == 2, "one layer of each tower"
    own = weights_of(model)
    with bound.weights.switched(1.0):
        assert same(weights_of(model), expected)
    assert same(weights_of(model), own) and not same(own, expected)


def test_another_model_is_refused_by_name(make_tiny, bundled):
    model = make_tiny()[0]
    with pytest.raises(ValueError, match="easyvqa-llava is of another architecture: only one of the two models has"):
        Weights(model, bundled.model.state_dict(), "easyvqa-llava")
    wide = weights_of(model)
    wide["lm_head.weight"] = wide["lm_head.weight"][:, :5]
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(\d+, 5\) in wide"):
        Weights(model, wide, "wide")


def test_quantised_weights_are_refused(make_tiny):
    model = make_tiny()[0]
    model.lm_head.weight = torch.nn.Parameter((model.lm_head.weight * 10).to(torch.int8), requires_grad=False)
    robust = weights_of(model)
    robust["lm_head.weight"] = robust["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.weight is torch.int8 .*use ensemble"):
        Weights(model, robust, "immune")


def test_check_needs_calibrated_heads(make_tiny, tmp_path):
    model, processor = make_tiny()
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no calibrated score, which check needs; calibrate it"):
        RobustWeights(str(tmp_path / "plain"), check=True).bind(Pipeline("tiny", model, processor))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "robust is empty"),
        ({"robust": "a", "alpha": 1.5}, "alpha is 1.5"),
        ({"robust": "a", "reach": 0}, "reach is"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"robust-weights: {message}"):
        RobustWeights(**settings)


def test_a_guard_that_is_made_while_another_answers_sees_the_own_weights(bundled):
    first = RobustWeights(IMMUNE).bind(bundled).weights
    made, inside = [], threading.Event()
    thread = threading.Thread(target=lambda: (inside.wait(), made.append(RobustWeights(IMMUNE).bind(bundled).weights)))
    thread.start()
    with first.switched(1.0):
        inside.set()
        thread.join(0.5)
        assert not made, "it waits for its turn"
    thread.join()
    assert len(made[0]._exchanged) == len(first._exchanged) > 100
