import io

import numpy as np
import pytest
from PIL import Image

from cmai_fast.data.pictures import expected_size, read_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def png(pixels=PIXELS):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_accepted_form_gives_the_same_pixels(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    forms = [PIXELS, Image.fromarray(PIXELS), tmp_path / "x.png", str(tmp_path / "x.png"), PIXELS / 255]
    forms.append((PIXELS / 255).astype(np.float32))
    for form in forms:
        picture = read_picture(form, (64, 48))
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), PIXELS)


def test_floats_are_rounded_to_the_nearest_level():
    levels = np.array([0.0, 0.4, 0.6, 100.4, 100.6, 254.6, 255.0]).reshape(1, -1, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(np.asarray(read_picture(levels / 255))[0, :, 0], [0, 0, 1, 100, 101, 255, 255])


def test_gray_palette_and_transparent_pictures_become_rgb():
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        assert read_picture(Image.fromarray(PIXELS).convert(mode)).mode == "RGB"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.95])
def test_a_truncated_png_is_refused_by_name(tmp_path, share):
    whole = png()
    (tmp_path / "cut.png").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.png"):
        read_picture(tmp_path / "cut.png")


def test_a_truncated_picture_that_is_still_unread_is_refused():
    whole = png()
    with pytest.raises(ValueError, match=r"image 3 cannot be decoded.*truncated"):
        read_picture(Image.open(io.BytesIO(whole[: len(whole) // 2])), name="image 3")


def test_a_file_that_is_none_or_no_image_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png.*cannot be read"):
        read_picture(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"gone\.png.*not a file"):
        read_picture(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="not a file"):
        read_picture(tmp_path)


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
        (PIXELS.astype(np.int64), "dtype int64"),
        (PIXELS.transpose(2, 0, 1), "channels last"),
        (PIXELS[..., 0], r"shape \(64, 48\)"),
        (PIXELS[:0], "shape"),
        (None, "shape"),
        (Image.fromarray(np.zeros((4, 4), np.int32)), "mode 'I'"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "mode 'F'"),
    ],
)
def test_bad_pixels_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        read_picture(image)


def test_a_wrong_size_is_refused_and_says_what_to_do():
    with pytest.raises(ValueError, match=r"64 x 48 .* takes 32 x 32.*resize=True"):
        read_picture(PIXELS, (32, 32))


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
