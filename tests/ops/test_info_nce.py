"""info_nce: loss and gradients against cross-entropy in float64, and the memory it promises not to take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cmai_fast import ops
from cmai_fast.ops import reference

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SIZES = [(1, 1, 1), (3, 5, 7), (37, 61, 19), (64, 64, 33)]


def make_inputs(rows: int, count: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(rows, size, generator=generator), dim=1).to(dtype)
    keys = F.normalize(torch.randn(count, size, generator=generator), dim=1).to(dtype)
    labels = torch.randint(count, (rows,), generator=generator)
    return query, keys, labels, torch.tensor(14.0).to(dtype)


def plain(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * (query @ keys.T), labels)


def value_and_gradients(loss: Loss, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (query, keys, scale)]
    out = loss(leaves[0], leaves[1], labels, leaves[2])
    gradients = torch.autograd.grad(3 * out, leaves)
    return [out.detach(), *gradients]


@pytest.fixture(params=[1 << 20, 50], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_error_is_at_most_twice_that_of_plain_pytorch(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    query, keys, labels, scale = (tensor.to(device) for tensor in make_inputs(*sizes, dtype))
    got = value_and_gradients(ops.info_nce, query, keys, labels, scale)
    by_plain = value_and_gradients(plain, query, keys, labels, scale)
    exact = value_and_gradients(plain, query.double(), keys.double(), labels, scale.double())
    for mine, theirs, right in zip(got, by_plain, exact, strict=True):
        error, allowed = (mine.double() - right).abs().max(), (theirs.double() - right).abs().max()
        # A single number may come out exact in plain PyTorch by luck; half a unit in the last place is always allowed.
        floor = torch.finfo(mine.dtype).eps * max(1.0, float(right.abs().max()))
        assert error <= 2 * allowed + floor, f"error {error:.3e}, plain PyTorch {allowed:.3e}"


@pytest.mark.usefixtures("chunk")
def test_gradcheck() -> None:
    query, keys, labels, scale = make_inputs(4, 6, 5, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (query, keys, scale / 4)]
    assert torch.autograd.gradcheck(lambda q, k, s: ops.info_nce(q, k, labels, s), leaves)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation under it returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", 4096)
    rows, count, size = 300, 400, 8
    query, keys, labels, scale = make_inputs(rows, count, size)
    _, *lse = reference.info_nce(query, keys, labels, scale, True)
    with LargestTensor() as largest:
        reference.info_nce(query, keys, labels, scale, True)
        reference.info_nce_backward(torch.tensor(1.0), query, keys, labels, scale, *lse)
    assert 0 < largest.elements <= 4096 < rows * count
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda nothing: nothing):
        ops.info_nce(query.requires_grad_(), keys, labels, scale)
    assert saved and sum(saved) <= (rows + count) * size + 2 * rows + 1


def test_large_scale_does_not_overflow() -> None:
    query, keys, labels, _ = make_inputs(5, 9, 4)
    got = value_and_gradients(ops.info_nce, query, keys, labels, torch.tensor(1e4))
    right = value_and_gradients(plain, query, keys, labels, torch.tensor(1e4))
    torch.testing.assert_close(got, right)


def test_empty_batch_is_zero_with_zero_gradients() -> None:
    query, keys, labels, scale = make_inputs(0, 3, 4)
    for tensor in value_and_gradients(ops.info_nce, query, keys, labels, scale):
        assert not tensor.any()


def test_non_contiguous_inputs_and_dtypes() -> None:
    query, keys, labels, scale = make_inputs(6, 8, 10)
    right = value_and_gradients(ops.info_nce, query, keys, labels, scale)
    strided = value_and_gradients(
        lambda q, k, t, s: ops.info_nce(q.T.contiguous().T, k, t, s), query, keys, labels, scale
    )
    torch.testing.assert_close(strided, right)
    half = value_and_gradients(ops.info_nce, query.bfloat16(), keys, labels, scale.double())
    assert [tensor.dtype for tensor in half] == [torch.float64, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck(symmetric: bool) -> None:
    query, keys, labels, scale = make_inputs(4, 6, 5)
    loss, *lse = torch.ops.cmai_fast.info_nce(query, keys, labels, scale, symmetric)
    arguments = (torch.ones_like(loss), query, keys, labels, scale, *lse)
    torch.library.opcheck(torch.ops.cmai_fast.info_nce_backward.default, arguments)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, keys, scale)]
    torch.library.opcheck(torch.ops.cmai_fast.info_nce.default, (leaves[0], leaves[1], labels, leaves[2], symmetric))


def test_second_derivative_is_refused() -> None:
    query, keys, labels, scale = make_inputs(2, 3, 4)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(ops.info_nce(query, keys, labels, scale), query, create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("label", [-1, 5])
def test_label_out_of_range_is_named(label: int) -> None:
    query, keys, labels, scale = make_inputs(4, 5, 3)
    labels[2] = label
    with pytest.raises(RuntimeError, match=f"labels hold {label}, expected row numbers of keys, 0 to 4"):
        ops.info_nce(query, keys, labels, scale)


def test_wrong_arguments_are_named() -> None:
    query, keys, labels, scale = make_inputs(4, 5, 3)
    with pytest.raises(RuntimeError, match=r"keys has shape \(5, 2\), expected \(M, 3\)"):
        ops.info_nce(query, keys[:, :2], labels, scale)
    with pytest.raises(RuntimeError, match=r"labels has dtype torch.int32"):
        ops.info_nce(query, keys, labels.int(), scale)
    with pytest.raises(RuntimeError, match=r"scale has shape \(1,\)"):
        ops.info_nce(query, keys, labels, scale[None])
