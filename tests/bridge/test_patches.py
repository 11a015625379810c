"""Patch embeddings as matrix products: the same numbers, and the model is given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmai_fast.bridge.patches import patches_by_matmul


@pytest.mark.parametrize(("kernel", "size", "bias"), [((4, 4), (8, 12), True), ((2, 3), (7, 10), False)])
def test_output_and_pixel_gradient_are_those_of_the_convolution(
    kernel: tuple[int, int], size: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, kernel, stride=kernel, bias=bias, dtype=torch.float64))
    pixels = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.rand_like(model(pixels))
    expected = model(pixels)
    (slow,) = torch.autograd.grad((expected * weights).sum(), pixels)
    with patches_by_matmul(model):
        assert "forward" in model[0].__dict__
        found = model(pixels)
        (fast,) = torch.autograd.grad((found * weights).sum(), pixels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_only_patch_embeddings_change_and_all_come_back_after_an_exception() -> None:
    own = nn.Conv2d(3, 4, 2, stride=2)
    own.forward = lambda x: x  # type: ignore[method-assign]  # somebody's hook
    others = [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 2, stride=2, padding=1), nn.Conv2d(4, 4, 2, stride=2, groups=2)]
    others.append(nn.Conv2d(3, 4, 1))
    model = nn.ModuleList([nn.Conv2d(3, 4, 2, stride=2), own, *others])
    hook = own.forward
    context = patches_by_matmul(model)
    context.__enter__()
    assert ["forward" in m.__dict__ for m in model] == [True, True, False, False, False, False]
    assert own.forward is hook
    with pytest.raises(RuntimeError, match="stop"):
        context.gen.throw(RuntimeError("stop"))
    assert ["forward" in m.__dict__ for m in model] == [False, True, False, False, False, False]
    assert own.forward is hook
