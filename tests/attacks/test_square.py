"""The Square Attack: its schedule and bumps as in the paper, its optimum on a linear model, its queries, any layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmai_fast.attacks import ATTACKS, LOSSES, AttackResult, Victim
from cmai_fast.attacks.canvas import Canvas
from cmai_fast.attacks.square import bump, share_of
from cmai_fast.bridge import bridge_of
from cmai_fast.data import VQACollator
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from linear_bridge import SHAPE, LinearBridge
from linear_classes import ClassesBridge
from processors import GENERATIVE, processor_of, samples_of

square = ATTACKS["square"]
INNER = 0.4 + 0.2 * torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_share_of_pixels_is_halved_as_published():
    """Section 5: halved at 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries, and in proportion."""
    whole = [share_of(q, 10_000, 0.8) for q in (10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert whole == [0.8 / 2**k for k in (0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert [share_of(q, 5000, 0.4) for q in (5, 6, 4000, 4001)] == [0.4, 0.2, 0.4 / 2**8, 0.4 / 2**9]


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_a_bump_has_norm_one_and_two_halves_of_either_sign(side):
    """Each half is a sum of nested rectangles around its centre, the k-th of height 1 / (k + 1)^2."""
    found = bump(side)
    assert found.norm().item() == pytest.approx(1.0)
    whole = torch.zeros(side, side, dtype=torch.float64)
    for rows, sign in ((range(side // 2), 1), (range(side // 2, side), -1)):
        for k in range(max(len(rows), side) // 2 + 1):
            for i in range(len(rows)):
                for j in range(side):
                    if max(abs(i - len(rows) // 2), abs(j - side // 2)) <= k:
                        whole[rows[i], j] += sign / (k + 1) ** 2
    torch.testing.assert_close(found, whole / whole.norm())


def test_the_linf_optimum_of_a_linear_model_is_found_by_queries():
    bridge, threat = LinearBridge(), ThreatModel("linf", 16 / 255)
    result = square(bridge.victim(2), INNER, threat, steps=1200)
    best = threat.eps * bridge.direction().sign()
    torch.testing.assert_close(result.adv - INNER, best.expand_as(INNER), rtol=0, atol=1e-9)
    assert result.passes.full_backward == 0 and not result.fooled.any()


def test_more_queries_come_nearer_to_the_l2_optimum():
    bridge, threat = LinearBridge(), ThreatModel("l2", 0.3)
    own = bridge.victim(2)(bridge.victim(2).space.to_model(INNER), None, LOSSES["margin"]).loss.detach()
    best = ATTACKS["apgd"](bridge.victim(2), INNER, threat, steps=50, loss="margin").loss
    found = [square(bridge.victim(2), INNER, threat, steps=n).loss for n in (1, 30, 400)]
    assert (found[0] < found[1]).all() and (found[1] < found[2]).all() and (found[2] <= best).all()
    assert ((found[2] - own) > 0.5 * (best - own)).all()


def test_queries_are_counted_and_end_for_those_who_are_fooled():
    bridge = ClassesBridge(lead=0.0)
    said = bridge.logits(INNER).argmax(1).tolist()
    victim = bridge.of_class([said[0], (said[1] + 1) % 5])
    result = square(victim, INNER, ThreatModel("linf", 1e-5), steps=9)
    assert victim.forwards.tolist() == [10, 1] and victim.backwards.tolist() == [0, 0]
    assert result.fooled.tolist() == [False, True] and torch.equal(result.adv[1], INNER[1])
    soon = square(victim, INNER, ThreatModel("linf", 0.4), steps=200)
    assert soon.fooled.all() and victim.forwards[0] < 10 + 100


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.15)])
def test_what_is_found_for_a_sample_does_not_depend_on_the_batch(norm, eps):
    bridge, threat = ClassesBridge(lead=0.0), ThreatModel(norm, eps)
    clean = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    said, ids = bridge.logits(clean).argmax(1).tolist(), torch.arange(20, 26)

    def on(rows: list[int]) -> AttackResult:
        victim = bridge.of_class([said[i] for i in rows])
        return square(victim, clean[rows], threat, steps=70, restarts=2, seed=3, sample_ids=ids[rows])

    whole = on([0, 1, 2, 3, 4, 5])
    assert whole.fooled.any() and not whole.fooled.all()
    for rows in ([5, 1], [0, 3, 2, 4]):
        part = on(rows)
        torch.testing.assert_close(part.adv, whole.adv[rows], rtol=0, atol=1e-12)
        assert torch.equal(part.fooled, whole.fooled[rows])
    other = square(bridge.of_class(said), clean, threat, steps=70, seed=4, sample_ids=ids)
    assert not torch.equal(other.adv, whole.adv)


@pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 1.5)])
def test_it_breaks_a_model_without_gradients(norm, eps):
    """A rounded input has none, and PGD, which follows them, does not move."""
    bridge = ClassesBridge(lead=0.0)
    encode = bridge._encode
    bridge._encode = lambda x: encode((x * 64).round() / 64)  # type: ignore[method-assign]
    said = bridge.logits(INNER).argmax(1).tolist()
    threat = ThreatModel(norm, eps)
    assert not ATTACKS["pgd"](bridge.of_class(said), INNER, threat, random_start=False).fooled.any()
    assert square(bridge.of_class(said), INNER, threat, steps=300).fooled.all()


@pytest.mark.parametrize("name", ["LLaVA-OneVision", "Qwen2.5-VL", "SmolVLM"])
def test_pictures_of_tiles_and_patches(name):
    """The pictures are those that a person sees, whatever the model reads, and the way back gives the same images."""
    family = next(f for f in GENERATIVE if f.name == name)
    model, processor, samples = family.model(), processor_of(family), samples_of(family)
    victim = Victim(bridge_of(model), PixelSpace.from_processor(processor), VQACollator(processor)(samples))
    clean = victim.pixels()
    canvas, rows = Canvas(victim, clean), torch.tensor([2, 0])
    drawn = canvas.pictures(clean[rows], rows)
    assert torch.equal(canvas.images(drawn, rows, clean), clean[rows])
    for i, row in enumerate(rows.tolist()):
        seen = victim.pictures(clean)[row]
        assert (canvas.sizes[row] > 0).all(1).sum() >= 1
        for k, picture in enumerate(seen):
            height, width = canvas.sizes[row, k].tolist()
            top = k * canvas.height
            own = drawn[i, :, top : top + height, :width].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(np.rint(own * 255).astype(np.uint8), picture[:height, :width])
    for threat in (ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.5)):
        victim.exact = False
        result = square(victim, clean, threat, steps=4, loss="feature-distance")
        assert (threat.distance((result.adv - clean).double()) <= threat.eps + 1e-6).all()
        assert (result.adv != clean).flatten(1).any(1).all()
        assert torch.equal(victim.layout.only(result.adv), result.adv)  # padding stays


def test_a_share_that_means_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"square: p_init is 0\.0; expected a share of the pixels, above 0 and at most 1"
    ):
        square(None, None, ThreatModel(), p_init="0")
    with pytest.raises(ValueError, match=r"square has no setting 'gradient'.*loss \(a name\)"):
        square(None, None, ThreatModel(), gradient="exact")
