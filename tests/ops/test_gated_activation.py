"""gated_activation: values and gradients against float64, every element the same wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cmai_fast import ops
from cmai_fast.ops import backend, cpu, reference
from implementations import INTERPRETED, Implementation

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
# Less than a vector, one and a tail, several programs or blocks and a tail, and nothing left over.
SHAPES = [(3,), (5, 7), (2, 3, 1031), (3, 1040)]
# In Triton's interpreter a conversion to bfloat16 drops bits instead of rounding: there it is left to a GPU.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
GATED = pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
KINDS = pytest.mark.parametrize("kind", PLAIN)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extension's kernels are in use, a call that they leave to the reference fails; see `carried`."""
    if not INTERPRETED:
        backend.forget_choices()
        monkeypatch.setattr(backend, "_from_reference", lambda name: pytest.fail(f"{name} is left to the reference"))


carried = pytest.mark.usefixtures("carried", "on_cpu")


def make(shape: tuple[int, ...], dtype: torch.dtype, gated: bool, seed: int = 0) -> list[Tensor | None]:
    """x from -12 to 12 and beyond, other, and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    x, other, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    return [(4 * x).to(dtype), other.to(dtype) if gated else None, grad.to(dtype)]


def plain(kind: str) -> Callable[..., Tensor]:
    return lambda x, other=None: PLAIN[kind](x) if other is None else PLAIN[kind](x) * other


def operator(by: Implementation, kind: str) -> Callable[..., Tensor]:
    return lambda x, other=None: by("gated_activation")(x, other, kind)


def value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, other: Tensor | None, grad: Tensor, device: str = "cpu"
) -> list[Tensor]:
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, other) if t is not None]
    out = function(*leaves)
    assert out.is_contiguous()
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, grad.to(device)))]


def by_kernels(by: Implementation, kind: str, x: Tensor, other: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Value and gradients, without autograd."""
    value = by("gated_activation")(x, other, kind)
    grad_x, grad_other = by("gated_activation_backward")(grad, x, other, kind)
    assert other is not None or grad_other.shape == (0,)
    return [t.cpu() for t in (value, grad_x, grad_other)[: 2 if other is None else 3]]


@GATED
@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_that_of_plain_pytorch(
    implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, kind: str, gated: bool
) -> None:
    x, other, grad = make(shape, dtype, gated)
    got = by_kernels(implementation, kind, x, other, grad)
    by_plain = value_and_gradients(plain(kind), x, other, grad, implementation.device)
    wide = [None if tensor is None else tensor.double() for tensor in (x, other, grad)]
    exact = value_and_gradients(plain(kind), *wide)
    assert [tensor.dtype for tensor in got] == [dtype] * (3 if gated else 2)
    for mine, theirs, right in zip(got, by_plain, exact, strict=True):
        error, allowed = (mine.double() - right).abs(), (theirs.double() - right).abs()
        if dtype == torch.float32:
            # Both round several times; exponential and quotient are good to two units in the last place.
            most = 2 * allowed.max() + 2**-22 * right.abs().max()
            assert error.max() <= most, f"error {error.max():.3e}, plain PyTorch {allowed.max():.3e}"
        else:
            # Rounded once: half a unit in the last place, which float32 arithmetic before it moves by a little.
            half_unit = torch.finfo(dtype).eps / 2 * right.abs()
            assert (error <= 1.01 * half_unit + torch.finfo(dtype).smallest_normal * 2**-10 + 1e-6).all()
            assert error.square().mean() <= 1.01 * allowed.square().mean()


@GATED
@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_does_not_depend_on_its_place(
    kernel: Implementation, dtype: torch.dtype, kind: str, gated: bool
) -> None:
    """A vector's body and what is left over give the same bits, so a row does not depend on its batch."""
    x, other, grad = make((2104,), dtype, gated)
    whole = by_kernels(kernel, kind, x, other, grad)
    pieces = [(0, 1), (1, 4), (4, 20), (20, 53), (53, 1020), (1020, 2104)]
    for start, end in pieces[2:] if INTERPRETED else pieces:
        part = [None if t is None else t[start:end].clone() for t in (x, other, grad)]
        for one, all_of_it in zip(by_kernels(kernel, kind, *part), whole, strict=True):
            assert torch.equal(one, all_of_it[start:end]), (start, end)


@pytest.mark.not_interpreted("the interpreter has no wide accesses")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(3))
def test_a_tensor_that_is_not_aligned(kernel: Implementation, which: int, dtype: torch.dtype) -> None:
    case = make((264,), dtype, True)
    right = by_kernels(kernel, "silu", *case)
    # On the kernel's device, where the copy of a view would be aligned.
    case = [tensor.to(kernel.device) for tensor in case]
    case[which] = torch.cat([case[which][:1], case[which]])[1:]
    assert case[which].data_ptr() % 16 != 0
    assert all(torch.equal(a, b) for a, b in zip(by_kernels(kernel, "silu", *case), right, strict=True))


@pytest.mark.not_interpreted("what a thread or a program computes is tested by the place of an element")
def test_threads_do_not_change_the_result() -> None:
    x, other, grad = make((3, 200_001), torch.float32, True)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(value_and_gradients(ops.gated_activation, x, other, grad))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@KINDS
def test_large_and_small_values(kernel: Implementation, kind: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30, -30, 87, -87, 90, -90, 1e4, -1e4, 3e38, -3e38])
    value, slope = by_kernels(kernel, kind, x, None, torch.ones_like(x))
    right = value_and_gradients(plain(kind), x.double(), None, torch.ones_like(x).double())
    torch.testing.assert_close(value, right[0].float(), rtol=1e-5, atol=1e-35)
    torch.testing.assert_close(slope, right[1].float(), rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_in_its_own_element(kernel: Implementation, dtype: torch.dtype) -> None:
    x, other, grad = make((40,), dtype, True)
    x[3], other[17], grad[38] = float("nan"), float("nan"), float("nan")
    value, grad_x, grad_other = by_kernels(kernel, "silu", x, other, grad)
    assert value.isnan().nonzero().flatten().tolist() == [3, 17]
    assert grad_x.isnan().nonzero().flatten().tolist() == [3, 17, 38]
    assert grad_other.isnan().nonzero().flatten().tolist() == [3, 38]


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_that_of_the_reference(kernel: Implementation, dtype: torch.dtype, kind: str) -> None:
    x, other, grad = make((16,), dtype, True)
    x[3], x[5], other[7], grad[9] = float("inf"), -float("inf"), float("inf"), -float("inf")
    got = by_kernels(kernel, kind, x, other, grad)
    right = [reference.gated_activation(x, other, kind), *reference.gated_activation_backward(grad, x, other, kind)]
    assert right[0][3].isinf() and right[0][5].isnan() and right[1][7].isinf()
    for mine, theirs in zip(got, right, strict=True):
        assert mine.isnan().equal(theirs.isnan()) and mine.isinf().equal(theirs.isinf())
        assert mine[mine.isinf()].equal(theirs[mine.isinf()])


@pytest.mark.not_interpreted("float64 runs the reference")
@GATED
@KINDS
def test_gradcheck(kind: str, gated: bool) -> None:
    leaves = [t.requires_grad_() for t in make((3, 5), torch.float64, gated)[:2] if t is not None]
    assert torch.autograd.gradcheck(lambda *args: ops.gated_activation(*args, kind=kind), leaves)


@pytest.mark.not_interpreted("as what a kernel computes, by other tests")
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.sampled_from(list(PLAIN)), st.booleans(), st.integers(0, 99))
def test_kernels_give_what_the_reference_gives(size: int, kind: str, gated: bool, seed: int) -> None:
    x, other, grad = make((size,), torch.float32, gated, seed)
    mine = cpu.KERNELS["gated_activation"](x, other, kind)(x, other, kind)
    torch.testing.assert_close(mine, reference.gated_activation(x, other, kind), rtol=2e-6, atol=1e-6)
    mine = cpu.KERNELS["gated_activation_backward"](grad, x, other, kind)(grad, x, other, kind)
    right = reference.gated_activation_backward(grad, x, other, kind)
    torch.testing.assert_close(list(mine), list(right), rtol=2e-6, atol=4e-6)


@carried
def test_non_contiguous(in_use: Implementation) -> None:
    x, other, grad = make((5, 3, 8), torch.float32, True)
    function = operator(in_use, "silu")
    right = value_and_gradients(function, x, other, grad, in_use.device)
    turned = value_and_gradients(lambda a, b: function(a.mT.contiguous().mT, b), x, other, grad, in_use.device)
    strided = value_and_gradients(function, x, other, grad.mT.contiguous().mT, in_use.device)
    for got in (turned, strided):
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@carried
def test_one_tensor_as_both(in_use: Implementation) -> None:
    x, _, grad = make((40,), torch.float32, False)
    function = operator(in_use, "silu")
    value, gradient = value_and_gradients(lambda a: function(a, a), x, None, grad, in_use.device)
    apart = value_and_gradients(function, x, x.clone(), grad, in_use.device)
    assert torch.equal(value, apart[0])
    torch.testing.assert_close(gradient, apart[1] + apart[2])


def test_empty_and_scalar(in_use: Implementation) -> None:
    function = in_use("gated_activation")
    empty = torch.zeros(0, 3, requires_grad=True)
    out = function(empty, torch.zeros(0, 3))
    out.sum().backward()
    assert out.shape == (0, 3) and empty.grad is not None and empty.grad.shape == (0, 3)
    torch.testing.assert_close(function(torch.tensor(2.0)).cpu(), F.silu(torch.tensor(2.0)))


def test_one_branch_alone_may_require_a_gradient(in_use: Implementation) -> None:
    x, other, grad = make((40,), torch.float32, True)
    both = value_and_gradients(operator(in_use, "silu"), x, other, grad, in_use.device)
    for number in (0, 1):
        leaves = [t.to(in_use.device, copy=True) for t in (x, other)]
        leaves[number].requires_grad_()
        (alone,) = torch.autograd.grad(in_use("gated_activation")(*leaves), leaves[number], grad.to(in_use.device))
        assert torch.equal(alone.cpu(), both[1 + number])


@pytest.mark.not_interpreted("autocast is PyTorch's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_dtype_as_it_is(dtype: torch.dtype) -> None:
    x, other, grad = make((40,), dtype, True)
    right = value_and_gradients(ops.gated_activation, x, other, grad)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(ops.gated_activation, x, other, grad)
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(got, right, strict=True))


@carried
@GATED
def test_opcheck(in_use: Implementation, gated: bool) -> None:
    x, other, grad = (None if t is None else t.to(in_use.device) for t in make((3, 2, 5), torch.float32, gated))
    leaves = tuple(None if t is None else t.clone().requires_grad_() for t in (x, other))
    torch.library.opcheck(torch.ops.cmai_fast.gated_activation.default, (*leaves, "quick_gelu"))
    torch.library.opcheck(torch.ops.cmai_fast.gated_activation_backward.default, (grad, x, other, "silu"))


@GATED
def test_second_derivative_is_refused(gated: bool) -> None:
    leaves = [t.requires_grad_() for t in make((4,), torch.float32, gated)[:2] if t is not None]
    grads = torch.autograd.grad(ops.gated_activation(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_activation has no second derivative"):
        sum(grad.sum() for grad in grads).backward()


def by_dispatcher(x: Tensor, other: Tensor | None = None, kind: str = "silu") -> Tensor:
    return torch.ops.cmai_fast.gated_activation(x, other, kind)


def dispatched(profile: torch.profiler.profile) -> set[str]:
    """The operators of the library that PyTorch's dispatcher was asked for."""
    return {event.name for event in profile.events() if event.name.startswith("cmai_fast::")}


@carried
@GATED
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_without_the_dispatcher_gives_the_same_bits(
    in_use: Implementation, dtype: torch.dtype, gated: bool
) -> None:
    """The dispatcher would take more time than everything else of a small call."""
    x, other, grad = make((5, 7), dtype, gated)
    on_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on_cpu) as direct:
        mine = value_and_gradients(operator(in_use, "quick_gelu"), x, other, grad, in_use.device)
        with torch.no_grad():
            alone = in_use("gated_activation")(x, other, "quick_gelu").cpu()
    with torch.profiler.profile(activities=on_cpu) as by_operator:
        right = value_and_gradients(lambda *a: by_dispatcher(*a, kind="quick_gelu"), x, other, grad, in_use.device)
    assert dispatched(direct) == set()
    assert {"cmai_fast::gated_activation", "cmai_fast::gated_activation_backward"} <= dispatched(by_operator)
    assert all(torch.equal(a, b) for a, b in zip([alone, *mine], [right[0], *right], strict=True))


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_transforms_see_the_operators() -> None:
    x, other, grad = make((5, 7), torch.float32, True)
    x.requires_grad_()
    with Watching() as forward:
        out = ops.gated_activation(x, other)
    assert "cmai_fast.gated_activation.default" in forward.names
    for value in (out, ops.gated_activation(x, other)):  # also where the forward pass had no mode
        with Watching() as backward:
            torch.autograd.grad(value, x, grad)
        assert "cmai_fast.gated_activation_backward.default" in backward.names
    with FakeTensorMode() as mode:
        assert isinstance(ops.gated_activation(mode.from_tensor(x)), FakeTensor)
    # One row of gradients at a time, and all rows in one transform.
    rows = torch.eye(grad.numel()).view(-1, *grad.shape)
    value = ops.gated_activation(x, other)
    one_by_one = torch.stack([torch.autograd.grad(value, x, row, retain_graph=True)[0] for row in rows])
    (at_once,) = torch.autograd.grad(value, x, rows, is_grads_batched=True)
    assert torch.equal(at_once, one_by_one)


def test_gradients_that_are_not_what_their_memory_holds() -> None:
    x, other, grad = make((5, 7), torch.float32, True)
    leaves = [x.requires_grad_(), other.requires_grad_()]
    for row in (torch._neg_view(grad), torch._efficientzerotensor(grad.shape)):
        found, right = (
            torch.autograd.grad(function(*leaves), leaves, row) for function in (ops.gated_activation, by_dispatcher)
        )
        torch.testing.assert_close(found, right)


@GATED
def test_what_a_backward_pass_needs_is_saved_for_it(gated: bool) -> None:
    """By hooks, as checkpoints and offloading do it, and with a check that nobody changes it."""
    x, other, grad = make((5, 7), torch.float32, gated)
    right = value_and_gradients(ops.gated_activation, x, other, grad)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooked = value_and_gradients(ops.gated_activation, x, other, grad)
    assert [tensor.shape for tensor in packed] == [x.shape] * (2 if gated else 1)
    again = value_and_gradients(
        lambda *args: checkpoint(ops.gated_activation, *args, use_reentrant=False), x, other, grad
    )
    for got in (hooked, again):
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    gate = x.clone().requires_grad_() * 1
    out = ops.gated_activation(gate, other)
    gate.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_gradients_nothing_is_recorded() -> None:
    x, other, _ = make((5, 7), torch.float32, True)
    assert ops.gated_activation(x, other).grad_fn is None
    with torch.no_grad():
        assert not ops.gated_activation(x.requires_grad_(), other).requires_grad
    with torch.inference_mode():
        assert ops.gated_activation(x, other).is_inference()
    assert ops.gated_activation(x.detach(), other.requires_grad_()).requires_grad


def test_arguments_of_the_wrong_type_are_named() -> None:
    x = torch.rand(2, 3, requires_grad=True)
    for arguments, name in [((1.0,), "x"), ((x, 2.0), "other"), ((x, [x]), "other"), ((x, None, ["silu"]), "kind")]:
        with pytest.raises(RuntimeError, match=rf"gated_activation\(\).*'{name}'"):
            ops.gated_activation(*arguments)


def test_wrong_arguments_are_named() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(RuntimeError, match="kind is 'gelu', expected one of silu, quick_gelu"):
        ops.gated_activation(x, kind="gelu")
    with pytest.raises(RuntimeError, match=r"other has shape \(2, 1\), expected \(2, 3\) like x"):
        ops.gated_activation(x, x[:, :1])
    with pytest.raises(RuntimeError, match=r"other has dtype torch.float16, expected torch.float32 like x"):
        ops.gated_activation(x, x.half())
    with pytest.raises(RuntimeError, match=r"other is on meta but x is on cpu; move other there"):
        ops.gated_activation(x, x.to("meta"))
    with pytest.raises(RuntimeError, match=r"x has dtype torch.int64"):
        ops.gated_activation(x.long())
    with pytest.raises(RuntimeError, match=r"grad has shape \(3,\), expected \(2, 3\) like x"):
        torch.ops.cmai_fast.gated_activation_backward(x[0], x, None, "silu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu")
def test_a_graph_records_forward_and_backward() -> None:
    x, other, grad = (t.cuda() for t in make((577, 1024), torch.bfloat16, True) if t is not None)
    leaves = [x.requires_grad_(), other.requires_grad_()]

    def differentiate() -> list[Tensor]:
        out = ops.gated_activation(*leaves, kind="quick_gelu")
        return [t.detach() for t in (out, *torch.autograd.grad(out, leaves, grad))]

    before = differentiate()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = differentiate()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    right = differentiate()
    assert all(torch.equal(a, b) for a, b in zip(recorded, right, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, right, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu")
def test_more_than_2_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of memory")
    x = torch.zeros(2**31 + 5, dtype=torch.bfloat16, device="cuda")
    x[-1], x[0] = 3.0, -3.0
    out = torch.ops.cmai_fast.gated_activation(x, x)
    grad_x, grad_other = torch.ops.cmai_fast.gated_activation_backward(out, x, x, "silu")
    ends = torch.tensor([-3.0, 3.0], dtype=torch.bfloat16, device="cuda")
    right = torch.ops.cmai_fast.gated_activation(ends, ends)
    assert torch.equal(out[[0, -1]], right) and out.count_nonzero() == 2
    for found, small in zip(
        (grad_x, grad_other), torch.ops.cmai_fast.gated_activation_backward(right, ends, ends, "silu"), strict=True
    ):
        assert torch.equal(found[[0, -1]], small) and found.count_nonzero() == 2
