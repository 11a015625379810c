"""cosine_heads: values and gradients against float64, and what zero, NaN and huge vectors give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cmai_fast import ops
from implementations import INTERPRETED, Implementation

# The last is longer than what a program reads at a time.
SHAPES = [(1, 1, 1), (5, 3, 7), (33, 2, 130), (3, 2, 1031)]
# In Triton's interpreter a conversion to bfloat16 drops bits instead of rounding: there it is left to a GPU.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def make_pair(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator)
    return image.to(dtype), (0.5 * image + torch.randn(shape, generator=generator)).to(dtype)


def value_and_gradients(
    score: object, image: Tensor, text: Tensor, weight: Tensor, device: str = "cpu"
) -> list[Tensor]:
    image, text = (tensor.to(device, copy=True).requires_grad_() for tensor in (image, text))
    out = score(image, text)  # type: ignore[operator]
    (out * weight.to(device, out.dtype)).sum().backward()
    assert image.grad is not None and text.grad is not None
    return [out.detach().cpu(), image.grad.cpu(), text.grad.cpu()]


def plain(image: Tensor, text: Tensor) -> Tensor:
    return F.cosine_similarity(image, text, dim=-1)


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(
    in_use: Implementation, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    image, text = make_pair(shape, dtype)
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape[:2])
    got = value_and_gradients(in_use("cosine_heads"), image, text, weight, in_use.device)
    by_plain = value_and_gradients(plain, image, text, weight, in_use.device)
    exact = value_and_gradients(plain, image.double(), text.double(), weight)
    for mine, theirs, right in zip(got, by_plain, exact, strict=True):
        error, allowed = (mine.double() - right).abs().max(), (theirs.double() - right).abs().max()
        assert error <= 2 * allowed + 2**-23, f"error {error:.3e}, plain PyTorch {allowed:.3e}"


def test_dtypes() -> None:
    image, text = make_pair((2, 1, 4), torch.bfloat16)
    image, text = image.requires_grad_(), text.double().requires_grad_()
    score = ops.cosine_heads(image, text)
    assert score.dtype == torch.float64
    assert ops.cosine_heads(image, text.bfloat16()).dtype == torch.float32
    score.sum().backward()
    assert image.grad is not None and image.grad.dtype == torch.bfloat16
    assert text.grad is not None and text.grad.dtype == torch.float64


def test_gradcheck() -> None:
    image, text = (tensor.requires_grad_() for tensor in make_pair((3, 2, 5), torch.float64))
    assert torch.autograd.gradcheck(ops.cosine_heads, (image, text))


@pytest.mark.usefixtures("carried")
def test_parallel_vectors_score_at_most_one(in_use: Implementation) -> None:
    rows = 40 if INTERPRETED else 500  # a program each
    image, _ = make_pair((rows, 1, 67), torch.float32)
    cosine = in_use("cosine_heads")
    assert cosine(image, 3 * image).max() <= 1
    assert cosine(image, -3 * image).min() >= -1
    torch.testing.assert_close(cosine(image, 3 * image).cpu(), torch.ones(rows, 1))


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("size", [0.0, 1e-13])
def test_zero_vectors_score_zero_without_gradient(in_use: Implementation, size: float) -> None:
    image, text = make_pair((4, 2, 6), torch.float32)
    image[1, 0] *= size
    text[2, 1] *= size
    score, grad_image, grad_text = value_and_gradients(
        in_use("cosine_heads"), image, text, torch.ones(4, 2), in_use.device
    )
    for row, head in ((1, 0), (2, 1)):
        assert score[row, head] == 0
        assert not grad_image[row, head].any() and not grad_text[row, head].any()
    assert (score != 0).sum() == 6 and grad_image.isfinite().all() and grad_text.isfinite().all()


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_own_pair(in_use: Implementation, bad: float) -> None:
    image, text = make_pair((4, 2, 6), torch.float32)
    image[1, 0, 3] = bad
    score, grad_image, grad_text = value_and_gradients(
        in_use("cosine_heads"), image, text, torch.ones(4, 2), in_use.device
    )
    for tensor in (score, grad_image.sum(-1), grad_text.sum(-1)):
        bad = tensor.isnan()
        assert bad[1, 0] and bad.sum() == 1


def test_empty(in_use: Implementation) -> None:
    cosine = in_use("cosine_heads")
    assert cosine(torch.zeros(0, 2, 5), torch.zeros(0, 2, 5)).shape == (0, 2)
    assert not cosine(torch.zeros(2, 2, 0), torch.zeros(2, 2, 0)).any()


@pytest.mark.usefixtures("carried")
def test_non_contiguous(in_use: Implementation) -> None:
    cosine = in_use("cosine_heads")
    image, text = make_pair((5, 3, 8), torch.float32)
    weight = torch.ones(5, 3)
    right = value_and_gradients(cosine, image, text, weight, in_use.device)
    strided = value_and_gradients(lambda a, b: cosine(a.mT.contiguous().mT, b), image, text, weight, in_use.device)
    torch.testing.assert_close(strided, right)


@pytest.mark.usefixtures("carried")
def test_two_dtypes_in_one_pair(in_use: Implementation) -> None:
    image, text = make_pair((5, 3, 8), torch.float16)
    weight, cosine = torch.ones(5, 3), in_use("cosine_heads")
    got = value_and_gradients(cosine, image, text.float(), weight, in_use.device)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.float16, torch.float32]
    right = value_and_gradients(cosine, image.float(), text.float(), weight, in_use.device)
    torch.testing.assert_close(got[0], right[0])
    torch.testing.assert_close(got[1], right[1].half())


@pytest.mark.usefixtures("carried")
def test_opcheck(in_use: Implementation) -> None:
    image, text = (tensor.to(in_use.device).requires_grad_() for tensor in make_pair((3, 2, 5), torch.float32))
    torch.library.opcheck(torch.ops.cmai_fast.cosine_heads.default, (image, text))
    arguments = (torch.ones(3, 2, device=in_use.device), image.detach(), text.detach())
    torch.library.opcheck(torch.ops.cmai_fast.cosine_heads_backward.default, arguments)


def test_second_derivative_is_refused() -> None:
    image, text = (tensor.requires_grad_() for tensor in make_pair((2, 1, 3), torch.float32))
    (grad,) = torch.autograd.grad(ops.cosine_heads(image, text).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="cosine_heads has no second derivative"):
        grad.sum().backward()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"image has shape \(2, 3\), expected \(N, H, D\)"):
        ops.cosine_heads(torch.rand(2, 3), torch.rand(2, 3))
    with pytest.raises(RuntimeError, match=r"text has shape \(2, 1, 3\), expected \(2, 1, 4\) like image"):
        ops.cosine_heads(torch.rand(2, 1, 4), torch.rand(2, 1, 3))
    with pytest.raises(RuntimeError, match=r"image has dtype torch.int64"):
        ops.cosine_heads(torch.ones(2, 1, 4, dtype=torch.int64), torch.rand(2, 1, 4))
