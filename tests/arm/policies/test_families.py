"""Every policy on every family: tiles, patches and dual encoders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmai_fast.arm import Guard
from cmai_fast.arm.policies import Certify, Ensemble, Purify, Smooth
from cmai_fast.arm.policies.policy import decide
from cmai_fast.arm.policies.robust_weights import Weights
from cmai_fast.bridge import bridge_of
from cmai_fast.cmcv import ConsistencyHeads
from cmai_fast.pipeline import Generation, Pipeline
from processors import GENERATIVE, processor_of, samples_of


def guarded(name, model, processor):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bridge = bridge_of(model)
        heads = ConsistencyHeads(bridge.image_dim, bridge.text_dim, dim=8, hidden=16)
    return Pipeline(name, model, processor, heads, generation=Generation(2))


def check_all(pipeline, samples):
    """All policies answer, at a threshold that every score reaches once a policy asks again."""

    def cases(policy):
        found = []

        def keep(case):
            found.append(replace(case, threshold=-1.1))

        Guard(pipeline, [keep], threshold=1.1).decide_samples(samples)
        return decide(policy, found)

    for policy in (
        Smooth(draws=2, agreement=0.1, seed=0),
        Smooth(draws=2, change="noise", agreement=0.1, seed=0),
        Ensemble((pipeline,), agree=1).bind(pipeline),
        *(Purify(method, steps=1) for method in ("blur", "jpeg", "resize", "counter", "anti-adversary")),
        Certify(n0=2, n=12, sigma=0.05, seed=0),
    ):
        decisions = cases(policy)
        assert [d.id for d in decisions] == [s.id for s in samples], policy
        assert all(d.answer is not None for d in decisions), policy


@pytest.mark.parametrize("family", GENERATIVE, ids=lambda f: f.name)
def test_all_policies_on_a_generative_family(family):
    pipeline = guarded(family.name, family.model(), processor_of(family))
    check_all(pipeline, [replace(s, references=()) for s in samples_of(family)])
    own = pipeline.model.state_dict(keep_vars=True)
    robust = {k: v.detach() + 0.01 if v.is_floating_point() else v for k, v in own.items()}
    weights = Weights(pipeline.model, robust, "robust")
    before = {k: v.data_ptr() for k, v in own.items()}
    with weights.switched(1.0):
        assert all(torch.equal(v, robust[k]) for k, v in pipeline.model.state_dict().items())
    assert {k: v.data_ptr() for k, v in pipeline.model.state_dict(keep_vars=True).items()} == before


def test_all_policies_on_a_dual_encoder():
    from cmai_fast.data import Sample, load_dataset
    from colour_clip import WORDS, model, processor

    pipeline = guarded("clip", model(), processor())
    data = load_dataset("easyvqa", "test", limit=3, seed=0)
    texts = tuple(f"a {word} shape" for word in WORDS[6:10])
    samples = [Sample(i, data[i].images, "", (), texts) for i in range(3)]
    pipeline.choose_from(samples)
    check_all(pipeline, samples)
