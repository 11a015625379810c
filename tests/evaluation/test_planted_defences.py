"""Four defences that do nothing but hide: each is exposed by the checks, or by an error that names it."""

from __future__ import annotations

import copy

import pytest
import torch

from cmai_fast.bridge import is_right, task_loss
from cmai_fast.cmcv import Threshold
from cmai_fast.evaluation import sanity
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel

WIDE = ThreatModel("linf", 160 / 255)  # in which queries break the fitted model
MARGIN, SQUARE = AttackSpec("apgd", 12, settings={"loss": "margin"}), AttackSpec("square", 30)


def other_bridge(subject: Pipeline) -> Pipeline:
    """The same model behind a bridge of its own, so that attacks see what the test makes of it."""
    other = copy.copy(subject)
    other.bridge = copy.copy(subject.bridge)
    return other


@pytest.mark.filterwarnings("ignore:.*exactly 0")
def test_gradients_masked_by_saturation(subject, samples):
    """Logits times 10,000: the same answers, and a cross-entropy that is 0 with all its gradients. The margin of the
    standard suite does not saturate, and neither do queries, which find what gradients did not."""
    sure, fuse = other_bridge(subject), subject.bridge.fuse

    def scaled(*args, **kwargs):
        logits, targets = fuse(*args, **kwargs)
        return logits * 1e4, targets

    sure.bridge.fuse = scaled
    sure.bridge.losses = lambda h, **t: (lambda out: (task_loss(*out), is_right(out[0].detach(), out[1])))(
        scaled(h, **t)
    )
    masked = measure(sure, samples, WIDE, [AttackSpec("pgd", 4), AttackSpec("apgd", 4), SQUARE])
    assert not sanity._gradients_exist(masked)["passed"]
    (queries,) = sanity._queries(masked.record)
    assert queries["check"] == "gradients find what queries find" and not queries["passed"]
    honest = measure(sure, samples, WIDE, [MARGIN, SQUARE])
    assert honest.record["acc_robust"] <= masked.record["acc_robust"]
    assert sanity._gradients_exist(honest)["passed"]
    for broken, passed in ((2, True), (3, False)):
        attacks = {"pgd-4": {"name": "pgd", "broken": 50}, "square-30": {"name": "square", "broken": broken}}
        assert sanity._queries({"n": 100, "attacks": attacks})[0]["passed"] is passed


def test_randomness_without_expectation(make_tiny, subject, samples):
    """Noise at the input of the vision tower: two looks at one image differ, and a gradient is that of one look."""
    model = copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(0)

    def shake(module, args, kwargs):
        noise = lambda x: x + 0.5 * torch.randn(x.shape, generator=generator)  # noqa: E731
        if args:
            return (noise(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": noise(kwargs["pixel_values"])}

    model.model.vision_tower.register_forward_pre_hook(shake, with_kwargs=True)
    random = Pipeline("random", model, subject.processor)
    few = list(range(3))
    found = sanity._same_features(Runner(random, samples), few)
    assert not found["passed"] and found["detail"].endswith("the mean over its randomness (MeanOverTransforms)")
    assert sanity._same_features(Runner(subject, samples), few)["passed"]


def test_a_detached_graph(subject, samples):
    """Not an attack that fails quietly: an error that says what to do, and queries break the model."""
    cut, encode = other_bridge(subject), subject.bridge.encode_image
    cut.bridge.encode_image = lambda x, **k: encode(x, **k).detach()
    with pytest.raises(ValueError, match=r"no gradient of the loss reaches the image: LlavaFor.* use square"):
        measure(cut, samples, WIDE, [AttackSpec("pgd", 2)])
    assert measure(cut, samples, WIDE, [SQUARE]).record["acc_robust"] < 0.8


@pytest.mark.filterwarnings("ignore:.*exactly 0")
def test_a_detector_that_is_itself_masked(subject, samples):
    """Its score is rounded, so that the adaptive attack, once it has fooled the model, has no way past the guard."""
    guarded = copy.copy(subject)
    guarded.heads = copy.copy(subject.heads)
    score = subject.heads.score
    guarded.threshold = Threshold(2.0, 0.05, 100, "calibration")  # rejects everything
    plan = [AttackSpec("adaptive", 6, 3, {"targets": 1})]
    honest = measure(guarded, samples[:3], WIDE, plan)
    guarded.heads = copy.copy(subject.heads)
    rounded = {"score": lambda self, *parts: (score(*parts) * 4).round() / 4}
    guarded.heads.__class__ = type("Rounded", (type(subject.heads),), rounded)
    masked = measure(guarded, samples[:3], WIDE, plan)
    assert sanity._gradients_exist(honest)["passed"] and not sanity._gradients_exist(masked)["passed"]
