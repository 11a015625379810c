"""Resizing is that of Pillow, and its gradient that of the two matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cmai_fast.preprocessing.resampling import KERNELS, Resampling, matrix, resampling_of, to_levels

PILLOW = {name: Image.Resampling[name.upper()] for name in KERNELS}
SIZES = [((57, 33), (32, 32)), ((33, 57), (32, 32)), ((100, 140), (33, 32)), ((20, 24), (64, 50)), ((40, 9), (9, 40))]


def resized(picture: np.ndarray, size: tuple[int, int], kernel: str) -> torch.Tensor:
    made = Image.fromarray(picture).resize(size[::-1], PILLOW[kernel])
    return torch.from_numpy(np.array(made)).float() / 255


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("before, after", SIZES)
def test_a_picture_is_resized_as_pillow_does_it(kernel, before, after):
    picture = np.random.default_rng(1).integers(0, 256, before, dtype=np.uint8)
    real, pixels = resized(picture, after, kernel), torch.from_numpy(picture).float() / 255
    found, deviation = resampling_of(pixels, real)
    alike = kernel == "nearest" and before < after  # where a picture grows, the box takes the nearest pixel too
    assert (found.kernel, found.twice) == ("box" if alike else kernel, True) and deviation < 1.01
    apart = (found(pixels, *after) - real).abs() * 255
    # Weights that are no binary fractions: where a mean is half a level, Pillow's integers decide.
    assert apart.max() < 1.01 and (apart > 0.5).float().mean() < 0.08


def test_a_picture_that_is_rounded_once_is_told_apart():
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (30, 40))).float() / 255
    once = Resampling("bicubic", twice=False)
    found, deviation = resampling_of(pixels, once(pixels, 64, 50), Resampling("bicubic"))
    assert found == once and deviation == 0


def test_weights_sum_to_one_and_the_gradient_is_theirs():
    pixels = torch.rand(1, 3, 11, 17, dtype=torch.float64, requires_grad=True)
    way = torch.randn(1, 3, 6, 20, dtype=torch.float64)
    for how in (Resampling("lanczos"), Resampling("bicubic", tall_first=True), Resampling("bilinear", twice=False)):
        tall, wide = matrix(11, 6, how.kernel).double(), matrix(17, 20, how.kernel).double()
        torch.testing.assert_close(tall.sum(1), torch.ones(6).double(), atol=1e-6, rtol=0)
        (gradient,) = torch.autograd.grad((how(pixels, 6, 20) * way).sum(), pixels)
        torch.testing.assert_close(gradient, tall.T @ way @ wide)


def test_white_and_black_keep_their_gradient():
    pixels = torch.tensor([0.0, 1.0, 1 + 1e-7, -0.1, 0.5 / 255], requires_grad=True)
    made = to_levels(pixels)
    assert (made * 255).tolist() == [0, 255, 255, 0, 1]
    assert torch.autograd.grad(made.sum(), pixels)[0].tolist() == [1] * 5
