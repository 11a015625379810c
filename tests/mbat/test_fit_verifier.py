from __future__ import annotations

import torch

from cmai_fast.bridge import bridge_of
from cmai_fast.cmcv.alternatives import Alternatives
from cmai_fast.cmcv.statements import Statements
from cmai_fast.cmcv.tower import beside
from cmai_fast.cmcv.verifier import Verifier
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.mbat import verifier as fitting
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel


def test_a_tower_is_trained_and_the_model_stays(tiny_model, tiny_processor):
    samples = list(load_dataset("easyvqa", "train", 6, seed=3))
    statements = Statements(samples, Alternatives.of(samples))
    bridge = bridge_of(tiny_model)
    verifier = Verifier.new(
        bridge, tiny_processor.tokenizer, statements.alternatives, beside(bridge), width=16, dim=8, heads=2
    )
    batch = VQACollator(tiny_processor, statements=statements)(samples)
    own = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    before = [p.detach().clone() for p in verifier.bridge.vision_parameters]
    fitting.fit_verifier(
        verifier, PixelSpace.from_processor(tiny_processor), iter([batch] * 3), 1, ThreatModel("linf", 8 / 255),
        train_tower=True, inner_steps=1,
    )  # fmt: skip
    after = list(verifier.bridge.vision_parameters)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(after) / 2
    assert not any(p.requires_grad or p.grad is not None for p in after)
    assert all(torch.equal(own[k], v) for k, v in tiny_model.state_dict().items())
