"""CrossFire: the features turn to the target's, inside the ball."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cmai_fast.attacks import ATTACKS, Victim
from cmai_fast.attacks.crossfire import rendered
from cmai_fast.bridge import bridge_of
from cmai_fast.evaluation.runner import Runner
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from families import FAMILIES, MEAN, STD
from fitted import colours, fitted
from typed_prompts import snapshot

LINF = ThreatModel("linf", 8 / 255)
crossfire = ATTACKS["crossfire"]


def test_text_is_drawn_as_large_as_it_fits():
    assert (rendered("m" * 40, 32, 32) < 255).any()  # too long for a word, so it is broken
    for text, size in (("STOP", (64, 64)), ("a rather long sentence about a red circle", (48, 80))):
        picture = rendered(text, *size)
        assert picture.shape == (*size, 3) and picture.dtype == np.uint8
        ink = (picture < 128).any(-1)
        assert ink.any() and ink.mean() < 0.6
        edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert edge.mean() < 0.3  # not cut off
    tall = (rendered("STOP", 64, 64) < 128).any((1, 2)).sum()
    assert tall > (rendered("STOP AND GO ON", 64, 64) < 128).any((1, 2)).sum() / 4
    assert np.array_equal(rendered("STOP", 64, 64), rendered("STOP", 64, 64))


@pytest.mark.parametrize("kind", ["text", "picture"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_features_turn_to_those_of_the_target_inside_the_ball(kind, norm, case64, tmp_path):
    threat = LINF if norm == "linf" else ThreatModel("l2", 1.0)
    drawn = rendered("STOP", 64, 64)
    if kind == "picture":
        Image.fromarray(drawn).save(tmp_path / "stop.png")
    settings = {"text": "STOP"} if kind == "text" else {"picture": str(tmp_path / "stop.png")}
    victim = case64.victim()
    victim.exact = False
    before = snapshot(case64.model)
    found = [crossfire(victim, case64.clean, threat, steps=n, **settings) for n in (2, 20)]
    assert snapshot(case64.model) == before and victim.passes.vision_backward == 22
    encode = lambda x: victim.encode(case64.space.to_model(x)).flatten(1)  # noqa: E731
    goal = encode(torch.from_numpy(drawn.copy()).permute(2, 0, 1).double().expand(6, -1, -1, -1) / 255)
    with torch.no_grad():
        at = [F.cosine_similarity(encode(x), goal) for x in (case64.clean, found[0].adv, found[1].adv)]
    assert (at[0] < at[1]).all() and (at[1] < at[2]).all()
    torch.testing.assert_close(found[1].loss, at[2])
    assert (threat.distance(found[1].adv - case64.clean) <= threat.eps + 1e-9).all()


def test_the_fitted_model_breaks_the_same_in_any_batch(make_tiny):
    spec = AttackSpec("crossfire", 20, settings={"text": "red"})
    ball = ThreatModel("linf", 32 / 255)
    runs = [Runner(fitted(make_tiny), colours(), batch_size=n).attack(spec, ball) for n in (12, 5)]
    assert runs[0].predictions == runs[1].predictions and not runs[0].right.all()


def test_refused(tmp_path):
    for settings, said in (
        ({"text": " "}, "name one target"),
        ({"text": "a", "picture": "b"}, "name one target"),
        ({"picture": str(tmp_path / "no.png")}, r"no\.png'; expected a picture file"),
    ):
        with pytest.raises(ValueError, match=said):
            AttackSpec("crossfire", settings=settings)
    with pytest.raises(ValueError, match="name one target"):
        crossfire(None, None, LINF)  # type: ignore[arg-type]
    family = next(f for f in FAMILIES if f.name == "Qwen2-VL")
    model = family.model()
    victim = Victim(bridge_of(model), PixelSpace(MEAN, STD), family.batch(model, family.samples()))
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration reads a sample as"):
        crossfire(victim, torch.zeros(3, 4, 3, 8, 8), LINF, text="a")
