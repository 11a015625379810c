"""Whatever holds a picture gives the pixels that a viewer shows."""

from __future__ import annotations

import base64
import io
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.data.pictures import expected_size, read_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def encoded(picture=PIXELS, kind="PNG", **how):
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **how)
    return buffer.getvalue()


def read(image, **how):
    return np.asarray(read_picture(image, **how))


def test_every_form_gives_the_same_pixels(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(encoded())
    monkeypatch.setattr(pathlib.Path, "expanduser", lambda p: pathlib.Path(str(p).replace("~", str(tmp_path))))
    half_read = io.BytesIO(encoded())
    half_read.read(100)
    channels_first = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [
        tmp_path / "x.png", str(tmp_path / "x.png"), "~/x.png",
        encoded(), bytearray(encoded()), memoryview(encoded()), half_read, half_read,
        {"bytes": encoded(), "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")},
        {"bytes": encoded(), "path": "of/another/machine.png"},
        "data:image/png;base64," + base64.b64encode(encoded()).decode(),
        Image.fromarray(PIXELS), Image.open(io.BytesIO(encoded())),
        PIXELS, PIXELS[:, ::-1][:, ::-1], PIXELS.transpose(2, 0, 1), PIXELS.astype(np.uint16) * 257,
        PIXELS / 255, (PIXELS / 255).astype(np.float32),
        channels_first, torch.from_numpy(PIXELS), channels_first / 255, (channels_first / 255).requires_grad_(),
    ]  # fmt: skip
    for form in forms:
        picture = read_picture(form)
        assert picture.mode == "RGB" and picture.info == {}
        np.testing.assert_array_equal(np.asarray(picture), PIXELS)
    assert half_read.tell() == 100


def test_floats_are_rounded_to_the_nearest_level():
    levels = np.array([0.0, 0.4, 0.6, 100.4, 100.6, 254.6, 255.0]).reshape(1, -1, 1).repeat(3, axis=2).repeat(5, axis=0)
    np.testing.assert_array_equal(read(levels / 255)[0, :, 0], [0, 0, 1, 100, 101, 255, 255])
    for dtype in (torch.float16, torch.bfloat16):
        image = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = (image.double() * 255).round().permute(1, 2, 0)
        np.testing.assert_array_equal(read(image), expected)


@pytest.mark.parametrize(
    "array, shown",
    [
        (np.array([[False, True]] * 5), [0, 255]),
        (np.array([[[7], [8]]] * 5, np.uint8), [7, 8]),
        (np.array([[[7, 8]] * 5], np.uint8), [7, 8]),
        (np.array([[0, 65535, 128, 129, 32896]] * 6, np.uint16), [0, 255, 0, 1, 128]),
        (np.array([[0.0, 1.0]] * 5), [0, 255]),
        (np.zeros((5, 2)), [0, 0]),
        (np.zeros((5, 2), np.uint16), [0, 0]),
    ],
)
def test_gray_arrays(array, shown):
    for form in (array, torch.from_numpy(array.astype(np.float64) / 65535) if array.dtype == np.uint16 else array):
        np.testing.assert_array_equal(read(form)[0], np.array(shown)[:, None].repeat(3, 1))


def test_transparency_is_shown_on_white():
    """Of every kind: alpha channels, premultiplied, palettes and single colours that count as transparent."""
    clear, half = np.zeros((5, 6, 4), np.uint8), np.zeros((5, 6, 4), np.uint8)
    half[..., 3] = 128
    for form in (clear, clear / 255, torch.from_numpy(clear).permute(2, 0, 1), encoded(clear), Image.fromarray(clear)):
        assert (read(form) == 255).all()
    assert abs(int(read(half)[0, 0, 0]) - 127) <= 1
    for mode in ("LA", "PA", "La", "RGBa"):
        assert read_picture(Image.new(mode, (5, 6))).getpixel((0, 0)) == WHITE
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for how in ({"transparency": 0}, {"transparency": bytes([0, 255])}):
        np.testing.assert_array_equal(read(encoded(palette, **how))[0], [WHITE, (0, 0, 255)])
    gray = Image.fromarray(np.array([[3, 4]], np.uint8))
    deep = Image.fromarray(np.array([[3, 65535]], np.uint16))
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert read(encoded(gray, transparency=3))[0].tolist() == [[255] * 3, [4] * 3]
    assert read(encoded(rgb, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]
    assert read(encoded(deep, transparency=3))[0].tolist() == [[255] * 3, [255] * 3]


def test_modes_of_eight_bits():
    """Within what the mode itself can hold."""
    smooth = np.linspace(20, 230, 64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)
    for mode in ("RGB", "RGBX", "YCbCr", "HSV", "CMYK"):
        np.testing.assert_allclose(read(Image.fromarray(smooth).convert(mode)), smooth, atol=4)
    assert min(read_picture(Image.new("LAB", (4, 4), (255, 128, 128))).getpixel((0, 0))) >= 253
    one = Image.fromarray(PIXELS).convert("1")
    np.testing.assert_array_equal(read(one)[..., 0] == 255, np.asarray(one))
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(read(encoded(red, "JPEG")).astype(int) - [254, 0, 0]).max() <= 3  # not its negative
    palette = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(read(encoded(palette)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    levels = (np.arange(64 * 48).reshape(64, 48) * 21).astype(np.uint16)
    expected = np.round(levels / 257)
    np.testing.assert_array_equal(read(encoded(levels, kind))[..., 1], expected)
    if kind == "TIFF":
        np.testing.assert_array_equal(read(encoded(levels, kind, tiffinfo={262: 0}))[..., 1], 255 - expected)
        big_endian = Image.frombytes("I;16B", (48, 64), levels.astype(">u2").tobytes())
        np.testing.assert_array_equal(read(big_endian)[..., 1], expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind, orientation):
    """A red corner at the top left of what was photographed."""
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(np.ascontiguousarray(stored), kind, exif=exif, **({"quality": 100} if kind != "TIFF" else {}))
    for form in (content, Image.open(io.BytesIO(content)), read_picture(content)):
        shown = read(form)
        assert shown.shape == upright.shape
        assert shown[2, 2, 0] > 200 and shown[-3:, :, 0].max() < 60 and shown[:, -3:, 0].max() < 60


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_photo_with_damaged_exif_is_shown_as_it_is_stored():
    content = encoded(PIXELS, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff no exif")
    assert read(content).shape == PIXELS.shape


def test_several_frames_are_refused_and_photos_with_a_second_image_are_not():
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        for form in (content, Image.open(io.BytesIO(content))):
            with pytest.raises(ValueError, match=rf"image 3 has 2 frames or pages \({kind}\).*convert\('RGB'\)"):
                read_picture(form, name="image 3")
        assert read(Image.open(io.BytesIO(content)).convert("RGB")).shape == PIXELS.shape
    assert read(encoded(frames[0], "GIF")).shape == PIXELS.shape
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    phone = encoded(red, "MPO", save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(phone)).n_frames == 2 and read(phone)[..., 0].min() > 250


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.95])
def test_a_truncated_png_is_refused_by_name(tmp_path, share):
    whole = encoded()
    (tmp_path / "cut.png").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.png"):
        read_picture(tmp_path / "cut.png")


def test_a_truncated_picture_that_is_still_unread_is_refused():
    whole = encoded()
    with pytest.raises(ValueError, match=r"image 3 cannot be decoded.*truncated"):
        read_picture(Image.open(io.BytesIO(whole[: len(whole) // 2])), name="image 3")


def test_a_picture_too_large_for_pillow_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(encoded())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    with pytest.raises(ValueError, match=r"bomb\.png.*exceeds limit"):
        read_picture(tmp_path / "bomb.png")


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for image, message in (
        (tmp_path / "text.png", r"text\.png.*cannot be read.*10 bytes"),
        (tmp_path / "gone.png", r"gone\.png.*not a file"),
        (tmp_path, "not a file"),
        ("x" * 5000, "cannot be opened|not a file"),
        ("https://example.org/a.png", "'https://example.org/a.png' is a URL, and nothing is downloaded"),
        ("data:text/plain;base64,AAAA", "data URL that cannot be read"),
        ("data:image/png;base64,?", "data URL that cannot be read"),
        (b"", "0 bytes"),
        (encoded(PIXELS, "EPS"), "EPS, a program"),
        (io.StringIO("x"), "returns str.*'rb'"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"url": "x"}, "dict with 'url'"),
        ({"bytes": "text"}, "str under 'bytes'"),
        (None, r"None \(NoneType\); expected one picture"),
        (7, r"7 \(int\)"),
        ([Image.fromarray(PIXELS)], r"\(list\); expected one picture"),
    ):
        with pytest.raises(ValueError, match=f"^image 3.*({message})"):
            read_picture(image, name="image 3")


def with_value(value):
    image = np.full((64, 64, 3), 0.5)
    image[3, 4, 1] = value
    return image


@pytest.mark.parametrize(
    "image, message",
    [
        (with_value(np.nan), "1 NaN"),
        (with_value(-np.inf), "1 NaN or infinite"),
        (with_value(1.001), r"from 0\.5 to 1\.001"),
        (with_value(-0.001), r"from -0\.001"),
        (PIXELS.astype(np.float32), "by 255"),
        (torch.from_numpy(PIXELS).float(), "by 255"),
        (PIXELS.astype(np.int64), "dtype int64.*as uint8"),
        (PIXELS.astype(np.uint16), "up to 255, which would look black.*as uint8"),
        (PIXELS.astype(object), "dtype object"),
        (PIXELS[None], r"shape \(1, 64, 48, 3\)"),
        (PIXELS[..., :2], r"shape \(64, 48, 2\)"),
        (PIXELS[:0], "shape"),
        (PIXELS[:0, :, 0], "shape"),
        (PIXELS[:3], "may be first or last"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
        (Image.fromarray(np.zeros((4, 4), np.int32)), "mode 'I'"),
        (Image.fromarray(np.full((4, 4), 200, np.float32)), "from 200 to 200"),
    ],
)
def test_bad_pixels_are_named(image, message):
    with pytest.raises(ValueError, match=f"^photo.*{message}"):
        read_picture(image, name="photo")


def test_the_picture_handed_in_is_left_as_it_was():
    own = Image.fromarray(PIXELS)
    read_picture(own).putpixel((0, 0), BLACK)
    np.testing.assert_array_equal(np.asarray(own), PIXELS)
    opened = Image.open(io.BytesIO(encoded(Image.new("LA", (5, 5)))))
    read_picture(opened)
    assert opened.mode == "LA"


class Processor:
    def __init__(self, **settings):
        self.image_processor = type("ImageProcessor", (), settings)


def test_expected_size_is_what_the_processor_ends_with(tiny_processor):
    square = {"height": 336, "width": 224}
    assert expected_size(tiny_processor) == (64, 64)
    shortest = {"shortest_edge": 400}
    assert expected_size(Processor(do_center_crop=True, crop_size=square, size=shortest)) == (336, 224)
    unused = {"height": 1, "width": 1}
    assert expected_size(Processor(do_center_crop=False, crop_size=unused, size=square)) == (336, 224)
    assert expected_size(Processor(size=shortest)) is None
    assert expected_size(Processor()) is None
