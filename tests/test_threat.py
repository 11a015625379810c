import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmai_fast.pixels import PixelSpace, check_pixels, round_to_8bit
from cmai_fast.threat import SURFACES, Surface, ThreatModel, parse_eps

SPACE = PixelSpace([0.5, 0.4, 0.3], [0.5, 0.25, 0.2])


@pytest.mark.parametrize(
    "text, eps", [("8/255", 8 / 255), ("0.03", 0.03), (" 8 / 255 ", 8 / 255), (0.03, 0.03), (1, 1.0), ("0", 0.0)]
)
def test_eps_is_read_as_a_fraction_or_a_number(text, eps):
    assert parse_eps(text) == eps


@pytest.mark.parametrize(
    "bad", ["8", 8, "-0.1", "1.0001", math.nan, math.inf, "nan", "inf", "x", "", "8/0", "1e400", "1 6/255", "8//255"]
)
def test_eps_that_is_no_radius_is_refused_by_its_value(bad):
    with pytest.raises(ValueError, match="eps is"):
        parse_eps(bad)


def test_eps_in_levels_is_refused_with_what_was_meant():
    with pytest.raises(ValueError, match=r"\[0, 1\] pixel range.*did you mean 8/255\?"):
        parse_eps("8")


def test_threat_model_refuses_what_is_no_ball():
    with pytest.raises(ValueError, match="did you mean 8/255"):
        ThreatModel("linf", 8)
    with pytest.raises(ValueError, match="linf, l2"):
        ThreatModel("l1", 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parse_eps"):
        ThreatModel("linf", "8/255")  # type: ignore[arg-type]
    for eps in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="l2 radius"):
            ThreatModel("l2", eps)
    assert ThreatModel("l2", 3.0).eps == 3.0


def test_a_threat_model_is_read_from_text_once_for_both_norms():
    assert ThreatModel.parse("linf") == ThreatModel("linf", 8 / 255)
    assert ThreatModel.parse("linf", " 4 / 255").eps == 4 / 255
    assert ThreatModel.parse("l2", "3/2") == ThreatModel("l2", 1.5)
    with pytest.raises(ValueError, match=r"l2 ball needs its radius.*such as 0.5"):
        ThreatModel.parse("l2")
    with pytest.raises(ValueError, match=r"eps is 'much'.*such as 1.5"):
        ThreatModel.parse("l2", "much")


def test_distance_is_the_norm_of_each_row():
    delta = torch.tensor([[[3.0, -4.0]], [[0.5, 0.0]]])
    assert ThreatModel("linf", 1).distance(delta).tolist() == [4.0, 0.5]
    assert ThreatModel("l2", 1).distance(delta).tolist() == [5.0, 0.5]


def test_pixels_survive_the_way_to_the_model_and_back_exactly(tiny_processor):
    space = PixelSpace.from_processor(tiny_processor)
    image = torch.arange(256).repeat(48).reshape(64, 64, 3).to(torch.uint8).numpy()
    values = tiny_processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = space.to_pixels(values)
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(image).float() / 255)
    torch.testing.assert_close(space.to_model(pixels), values)


def test_pixel_space_keeps_float64_and_passes_gradients():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    SPACE.to_model(x).sum().backward()
    expected = (1 / SPACE.std.double())[:, None, None].expand_as(x)
    assert SPACE.to_model(x).dtype == torch.float64
    torch.testing.assert_close(x.grad, expected)


def test_pixel_values_of_another_normalisation_are_refused():
    with pytest.raises(ValueError, match=r"image 1 .* from 0.5 to 3; expected \[0, 1\]. .*this mean and std"):
        SPACE.to_pixels(
            torch.stack([torch.zeros(3, 2, 2), torch.tensor([0.0, 1.0, 13.5])[:, None, None].expand(3, 2, 2)])
        )


def test_pixels_that_are_no_pixels_are_refused():
    image = torch.full((2, 3, 2, 2), 0.5)
    for bad, said in ((math.nan, "NaN"), (math.inf, "infinite"), (1.1, "from 0.5 to 1.1"), (-0.1, "to_pixels")):
        broken = image.clone()
        broken[1, 2, 0, 1] = bad
        with pytest.raises(ValueError, match=rf"image 1 .*{said}"):
            check_pixels(broken)
    check_pixels(image)
    check_pixels(image[:0])
    with pytest.raises(ValueError, match=r"shape \(2, 4, 2, 2\); expected \(N, 3"):
        SPACE.to_model(torch.zeros(2, 4, 2, 2))


def test_processors_that_give_no_affine_map_are_refused():
    with pytest.raises(ValueError, match="no image_mean"):
        PixelSpace.from_processor(SimpleNamespace(do_normalize=True))
    with pytest.raises(ValueError, match=r"rescale_factor is 0\.5"):
        PixelSpace.from_processor(SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=0.5))
    with pytest.raises(ValueError, match="mean has 3 channels and std 2"):
        PixelSpace([0.5] * 3, [0.5] * 2)
    with pytest.raises(ValueError, match="above 0"):
        PixelSpace([0.5] * 3, [0.5, 0.5, 0.0])
    plain = PixelSpace.from_processor(SimpleNamespace(do_normalize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3))
    assert plain.mean.tolist() == [0.0] * 3 and plain.std.tolist() == [1.0] * 3


@st.composite
def points_of_a_ball(draw):
    """clean on the 8-bit grid and adv in ball and box, often on their borders."""
    norm = draw(st.sampled_from(["linf", "l2"]))
    levels = draw(st.sampled_from([0.0, 0.3, 1.0, 2.5, 8.0, 16.0, 255.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    clean = torch.randint(0, 256, (3, 3, 5, 5), generator=generator)
    clean = torch.where(torch.rand(clean.shape, generator=generator) < 0.3, clean // 128 * 255, clean) / 255
    direction = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    if norm == "linf":
        delta = direction.clamp(-1, 1) * levels / 255
    else:
        delta = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * levels / 255
    return (clean.double() + delta).clamp(0, 1).float(), clean, ThreatModel(norm, levels / 255)


@settings(max_examples=150, deadline=None)
@given(points_of_a_ball())
def test_rounded_to_8_bits_it_is_an_8_bit_image_in_ball_and_box(point):
    adv, clean, threat = point
    rounded = round_to_8bit(adv, clean, threat)
    levels = (rounded.double() * 255).round()
    assert torch.equal((levels / 255).float(), rounded)
    assert levels.min() >= 0 and levels.max() <= 255
    distance = threat.distance(levels - (clean.double() * 255).round())
    assert (distance <= threat.eps * 255 + 1e-6).all()
    # Less than a level away, and the nearest one wherever the ball does not forbid it.
    far = (rounded.double() - adv.double()).abs() * 255
    assert far.max() < 1
    outward = (rounded - clean).abs() > (adv - clean).abs() + 1e-6
    assert far[outward].numel() == 0 or far[outward].max() <= 0.5 + 1e-4


def test_rounding_spends_the_ball_that_is_left():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(60, 200, (2, 3, 32, 32), generator=generator) / 255
    delta = torch.randn(clean.shape, generator=generator)
    for threat in (ThreatModel("l2", 0.25), ThreatModel("l2", 1.0)):
        adv = clean + delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * threat.eps
        kept = threat.distance(round_to_8bit(adv, clean, threat) - clean)
        assert (kept > 0.99 * threat.eps).all()


def test_eight_whole_levels_stay_eight():
    clean = torch.full((1, 3, 2, 2), 100 / 255)
    for sign in (-1, 1):
        adv = clean + sign * 8 / 255
        assert torch.equal(
            (round_to_8bit(adv, clean, ThreatModel()) * 255).round(), torch.full_like(adv, 100 + 8 * sign)
        )
    one = clean.clone()
    one[0, 1, 0, 0] += torch.tensor(8 / 255)
    assert (round_to_8bit(one, clean, ThreatModel("l2", 8 / 255)) * 255).round().max() == 108


def test_rounded_image_survives_a_png():
    clean = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(1)) / 255
    rounded = round_to_8bit((clean + 0.02).clamp(0, 1), clean, ThreatModel())
    file = io.BytesIO()
    Image.fromarray((rounded[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()).save(file, "PNG")
    again = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(again, rounded[0])


def test_rounding_around_what_is_no_8_bit_image_is_refused():
    with pytest.raises(ValueError, match="8-bit grid"):
        round_to_8bit(torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.501), ThreatModel())


@pytest.mark.parametrize("text", ["input", "upload", "upload:jpeg=75", "patch:size=0.2,x=0,y=1", "patch", "blank"])
def test_a_threat_is_read_and_written_as_the_same_text(text):
    surface = Surface.parse(text)
    assert str(surface) == text and Surface.parse(str(surface)) == surface and surface.uploads == (text != "input")
    assert Surface.parse("patch: size = 0.2 , y=1") == Surface("patch", size=0.2, y=1.0)
    eps = {"patch": 1.0, "blank": 128 / 255}
    assert ThreatModel.parse("linf", None, surface).eps == eps.get(surface.name, 8 / 255)


@pytest.mark.parametrize(
    "text, message",
    [
        ("uplaod", "the threat is 'uplaod'; expected one of input, upload, patch, blank"),
        ("upload:size=0.2", "cannot read 'size=0.2'; upload takes jpeg=NUMBER"),
        ("input:jpeg=75", "cannot read 'jpeg=75'; input has no options"),
        ("upload:jpeg=7.5", "cannot read 'jpeg=7.5'"),
        ("upload:jpeg=100", "jpeg is 100 in the threat upload; expected 1 to 95"),
        ("patch:size=0", "the patch has size 0.0; expected a share"),
        ("patch:x=2", "the patch is at x=2.0, y=0.5; expected 0"),
    ],
)
def test_a_threat_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Surface.parse(text)


def test_the_docs_name_every_threat():
    table = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text()
    for name in SURFACES:
        what, options, eps = Surface(name).described()
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` | {what}")]
        assert row.endswith(f" {eps} |")
        assert all(f"`{option.partition('=')[0]}`" in row for option in filter(None, options.split(", ")))
