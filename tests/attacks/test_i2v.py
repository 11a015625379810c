"""I2V: features leave those of the clean image at a middle layer, inside the ball; frames of videos too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.attacks.i2v import cosines, i2v_frames, layer_features, layers_of
from cmai_fast.bridge import bridge_of
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from families import FAMILIES
from typed_prompts import snapshot

EPS = ThreatModel("linf", 8 / 255)
i2v = ATTACKS["i2v"]


def middle(model: nn.Module, space: PixelSpace, images: torch.Tensor, block: int) -> torch.Tensor:
    """The hidden state after a block of a LLaVA's tower, as `transformers` gives it."""
    with torch.no_grad():
        tower = model.model.vision_tower
        return tower(space.to_model(images), output_hidden_states=True).hidden_states[block + 1].flatten(1)


def test_features_in_the_middle_turn_away_inside_the_ball(case64):
    victim, before = case64.victim(), snapshot(case64.model)
    place = (case64.model.config.vision_config.num_hidden_layers - 1) // 2
    own = middle(case64.model, case64.space, case64.clean, place)
    last = torch.ones(6, dtype=torch.float64)
    for steps in (5, 25):
        result = i2v(victim, case64.clean, EPS, steps=steps)
        at = F.cosine_similarity(middle(case64.model, case64.space, result.adv, place), own)
        assert (at < last).all()
        torch.testing.assert_close(-result.loss, at, rtol=0, atol=1e-5)
        last = at
    assert (EPS.distance(result.adv - case64.clean) <= EPS.eps + 1e-9).all()
    assert result.adv.min() >= 0 and result.adv.max() <= 1 and snapshot(case64.model) == before
    assert torch.equal(~result.fooled, victim.right(result.adv))
    part = i2v(case64.victim([4, 1]), case64.clean[[4, 1]], EPS, steps=25, sample_ids=case64.sample_ids[[4, 1]])
    torch.testing.assert_close(part.adv, result.adv[[4, 1]], rtol=0, atol=1e-6)
    best = i2v(victim, case64.clean, EPS, steps=5, layers=("0",), restarts=2)
    first = i2v(victim, case64.clean, EPS, steps=5, layers=("0",))
    better = (best.fooled & ~first.fooled) | (best.loss >= first.loss)
    assert better.all() and (best.loss != first.loss).any()  # a random start is far from where the gradient is 0


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in ("Qwen2-VL", "LLaVA-NeXT", "CLIP")], ids=lambda f: f.name
)
def test_other_families(family):
    """Samples in tiles and patches: padding stays, and a sample's result is its own."""
    model = family.model()
    victim = Victim(
        bridge_of(model), PixelSpace.from_processor(family.processor), family.batch(model, family.samples())
    )
    clean = victim.pixels()
    result = i2v(victim, clean, EPS, steps=2)
    assert (EPS.distance(result.adv - clean) <= EPS.eps + 1e-6).all() and (result.loss > -1 + 1e-6).all()
    if victim.layout is not None:
        assert torch.equal(victim.layout.only(result.adv), result.adv)


class Tower(nn.Module):
    """Three blocks on flattened frames."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.Sequential(nn.Linear(3 * 8 * 8, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(images.flatten(1))


def test_frames_of_videos():
    tower = Tower().double().train()
    frames = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    encoder = layer_features(tower, tower, [0, 2])
    before = snapshot(tower)
    with torch.inference_mode():
        adv = i2v_frames(frames, [encoder], eps=8 / 255, steps=20)
    assert snapshot(tower) == before and adv.shape == frames.shape
    assert float((adv - frames).abs().max()) <= 8 / 255 + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    torch.testing.assert_close(i2v_frames(frames, [encoder], eps=8 / 255, steps=20, batch=2), adv)
    flat = lambda x: encoder(x.flatten(0, 1))  # noqa: E731
    noise = (frames + 8 / 255 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(2)).sign()).clamp(
        0, 1
    )
    with torch.no_grad():
        turned, noisy = cosines(flat(adv), flat(frames)), cosines(flat(noise), flat(frames))
    assert (turned.mean(1) < noisy.mean(1)).all()
    # One layer is what the plain formula says: away from its own features.
    (alone,) = layer_features(tower, tower, [1])(frames[0])
    torch.testing.assert_close(alone, torch.tanh(tower.blocks[0](frames[0].flatten(1))))


def test_refused(case64):
    with pytest.raises(ValueError, match=r"layers has 7; the encoder has the blocks 0 to"):
        i2v(case64.victim(), case64.clean, EPS, layers=("7",))
    with pytest.raises(ValueError, match="layers has 'a'; expected numbers of blocks"):
        AttackSpec("i2v", settings={"layers": "a"})
    with pytest.raises(ValueError, match="i2v: rate is nan"):
        AttackSpec("i2v", settings={"rate": "nan"})
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        layers_of([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"frames have shape \(3, 8, 8\)"):
        i2v_frames(torch.zeros(3, 8, 8), [])
    with pytest.raises(ValueError, match="Normalised pixel_values"):
        i2v_frames(torch.full((1, 1, 3, 8, 8), 2.0), [])
