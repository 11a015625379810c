"""info_nce: loss and gradients against PyTorch's own in float64, and the memory they promise not to
take."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cmai_fast import ops
from cmai_fast.ops import backend, operators, reference
from implementations import INTERPRETED, Implementation

Loss = Callable[..., Tensor]
# With tiles of 128 rows the last two have several in both directions, and edges inside a tile.
SIZES = [(1, 1, 1), (1, 7, 5), (3, 5, 7), (37, 61, 19), (64, 64, 33), (130, 67, 33), (300, 200, 20)]
# In Triton's interpreter a product of bfloat16 matrices is garbage: there they are left to a GPU.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
# The interpreter is slow: what fits one tile runs there once per kind of edge, and with one dtype.
CASES = [(sizes, dtype) for sizes in SIZES for dtype in DTYPES]
if INTERPRETED:
    CASES = [
        ((1, 1, 1), torch.float16),
        ((37, 61, 19), torch.float32),
        ((64, 64, 33), torch.float16),
        *((sizes, dtype) for sizes in SIZES[-2:] for dtype in DTYPES),
    ]
LOSSES = ["info_nce", "symmetric info_nce", "grouped info_nce", "symmetric grouped info_nce"]


def make_inputs(rows: int, count: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(rows, size, generator=generator), dim=1).to(dtype)
    keys = F.normalize(torch.randn(count, size, generator=generator), dim=1).to(dtype)
    labels = torch.randint(count, (rows,), generator=generator)
    return query, keys, labels, torch.tensor(14.0).to(dtype)


def some_groups(count: int) -> Tensor:
    """About three keys to a group; two groups each have the same lower 32 bits."""
    number = torch.randint(max(1, count // 3), (count,), generator=torch.Generator().manual_seed(1))
    return number // 2 + (number % 2 << 32) - 3


@functools.cache  # a CUDA graph captures no copy from the host
def options_of(name: str, count: int, device: str | torch.device = "cpu") -> dict[str, Any]:
    groups = some_groups(count).to(device) if "grouped" in name else None
    return {"symmetric": "symmetric" in name, "groups": groups}


def ours(by: Implementation, name: str) -> Loss:
    operator = by("info_nce")
    return lambda query, keys, *rest: operator(query, keys, *rest, **options_of(name, len(keys), query.device))


def left_out(labels: Tensor, groups: Tensor) -> Tensor:
    """(N, M) bool, by its definition: other keys of the group of a row's own key."""
    return (groups[labels][:, None] == groups) & (F.one_hot(labels, len(groups)) == 0)


def plain(name: str) -> Loss:
    """The masked matrix of logits, by PyTorch."""

    def loss(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        options, logits = options_of(name, len(keys), query.device), scale * (query @ keys.T)
        if options["groups"] is not None:
            logits = logits.masked_fill(left_out(labels, options["groups"]), -math.inf)
        by_row = F.cross_entropy(logits, labels)
        if not options["symmetric"]:
            return by_row
        return (by_row + F.cross_entropy(logits.T[labels], torch.arange(len(query), device=query.device))) / 2

    return loss


def value_and_gradients(
    loss: Loss, query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor, device: str = "cpu"
) -> list[Tensor]:
    """The loss, and three times its gradients for all but the labels, on the CPU."""
    leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (query, keys, scale)]
    out = loss(*leaves[:2], labels.to(device), leaves[2])
    gradients = torch.autograd.grad(3 * out, leaves)
    return [tensor.detach().cpu() for tensor in (out, *gradients)]


@pytest.fixture(autouse=True)
def by_the_operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of few logits on a CPU; the tests of those say so."""
    if not request.node.name.startswith("test_few_logits"):
        monkeypatch.setattr(operators, "_FEW_LOGITS", 0)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, in_use: Implementation) -> Iterator[None]:
    """Of the reference; and for Triton's kernels, whether a program walks over one tile or over several."""
    backend.forget_choices()  # plans remember what is changed here
    monkeypatch.setattr(reference, "_CHUNK", {"one chunk": 1 << 20, "many chunks": 2000}[request.param])
    if INTERPRETED or in_use.device == "cuda":
        from cmai_fast.ops.triton_kernels import info_nce, logits

        parts = {"one chunk": 64, "many chunks": 2}[request.param]
        monkeypatch.setattr(info_nce, "_MOST_PARTS", parts)
        monkeypatch.setattr(logits, "_PROGRAMS", 16 * parts)
        monkeypatch.setattr(logits, "_RESIDUAL_ROWS", {"one chunk": 4096, "many chunks": 128}[request.param])
    yield
    backend.forget_choices()


def assert_error_is_at_most_twice_that_of_plain_pytorch(
    by: Implementation, name: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    query, keys, labels, scale = make_inputs(*sizes, dtype)
    exact = value_and_gradients(plain(name), query.double(), keys.double(), labels, scale.double())
    got = value_and_gradients(ours(by, name), query, keys, labels, scale, device=by.device)
    by_plain = value_and_gradients(plain(name), query, keys, labels, scale, device=by.device)
    for mine, theirs, right in zip(got, by_plain, exact, strict=True):
        error, allowed = (mine.double() - right).abs().max(), (theirs.double() - right).abs().max()
        size = max(1.0, float(right.abs().max()))
        # A single number may come out exact in plain PyTorch by luck; half a unit in the last place is always allowed.
        # And exp(logit - lse) is off by what float32 rounds from an lse, here of about the size of the scale. Where
        # groups leave a row its own key alone, the loss is the difference of two such numbers, each off by a unit in
        # the last place.
        rounded = 2**-22 if "grouped" in name else 2**-24
        floor = (torch.finfo(mine.dtype).eps + rounded * float(scale)) * size
        assert error <= 2 * allowed + floor, f"error {error:.3e}, plain PyTorch {allowed:.3e}"


@pytest.mark.usefixtures("chunk", "carried")
@pytest.mark.parametrize("sizes, dtype", CASES)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "grouped info_nce" or not INTERPRETED])
def test_error_is_at_most_twice_that_of_plain_pytorch(
    in_use: Implementation, name: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert_error_is_at_most_twice_that_of_plain_pytorch(in_use, name, sizes, dtype)


@pytest.mark.parametrize("sizes, dtype", [(sizes, dtype) for sizes in SIZES for dtype in DTYPES])
@pytest.mark.parametrize("name", LOSSES)
def test_few_logits_on_a_cpu_are_as_exact(name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    by = Implementation(lambda operator: getattr(ops, operator))
    assert_error_is_at_most_twice_that_of_plain_pytorch(by, name, sizes, dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_few_logits_on_a_cpu_have_dtypes_and_errors_of_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ours(Implementation(lambda operator: getattr(ops, operator)), name)
    query, keys, labels, scale = make_inputs(4, 5, 3, torch.float16)
    inputs = (query.float(), keys, labels, scale.double())
    by_pytorch = value_and_gradients(loss, *inputs)
    assert value_and_gradients(loss, *make_inputs(0, 3, 4))[0] == 0
    with pytest.raises(RuntimeError, match="labels hold 5, expected row numbers of keys, 0 to 4"):
        loss(query, keys, labels * 0 + 5, scale)
    with pytest.raises(RuntimeError, match=r"keys has shape \(5, 2\)"):
        loss(query, keys[:, :2], labels, scale)
    monkeypatch.setattr(operators, "_FEW_LOGITS", 0)
    by_operator = value_and_gradients(loss, *inputs)
    assert [tensor.dtype for tensor in by_pytorch] == [tensor.dtype for tensor in by_operator]
    torch.testing.assert_close(by_pytorch, by_operator, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count, few", [(256, True), (257, False)])
def test_few_logits_on_a_cpu_are_left_to_pytorch(count: int, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in make_inputs(256, count, 3)]

    def is_by_the_operator() -> bool:
        return "cmai_fast_info_nce" in str(ops.info_nce(*inputs).grad_fn)

    assert is_by_the_operator() is not few
    with torch.autocast("cpu", torch.bfloat16):  # which products of PyTorch would follow
        assert is_by_the_operator()
    monkeypatch.setenv("CMAI_FAST_BACKEND", "reference")
    backend.forget_choices()
    try:
        assert is_by_the_operator(), "a backend was asked for by name"
    finally:
        monkeypatch.undo()
        backend.forget_choices()


@pytest.mark.usefixtures("chunk", "carried")
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_left_out_is_exactly_the_other_keys_of_the_group(in_use: Implementation, symmetric: bool) -> None:
    """With the identity as keys the gradient of the query is the derivative by the logits, times a number: zero where a
    logit is -inf, and nowhere else. A mask that is off by one, or by a tile, shows at once."""
    rows, count = 150, 200
    query = torch.rand(rows, count, generator=torch.Generator().manual_seed(0)).to(in_use.device).requires_grad_()
    labels, groups = torch.arange(rows) * 7 % count, some_groups(count)
    arguments = (torch.eye(count), labels, torch.tensor(2.0), groups)
    keys, own, scale, its = (tensor.to(in_use.device) for tensor in arguments)
    in_use("info_nce")(query, keys, own, scale, symmetric=symmetric, groups=its).backward()
    assert query.grad is not None
    out = left_out(labels, groups)
    assert int(out.sum()) > 300 and torch.equal(query.grad.cpu() == 0, out)


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_one_key_and_a_group_of_all(in_use: Implementation, symmetric: bool) -> None:
    query, keys, _, scale = make_inputs(70, 130, 16)
    operator, labels = in_use("info_nce"), torch.arange(70)

    def by(groups: Tensor | None) -> list[Tensor]:
        its = None if groups is None else groups.to(in_use.device)
        loss = lambda *tensors: operator(*tensors, symmetric=symmetric, groups=its)  # noqa: E731
        return value_and_gradients(loss, query, keys, labels, scale, device=in_use.device)

    torch.testing.assert_close(by(torch.arange(130) - 60), by(None), rtol=1e-4, atol=1e-5)
    for tensor in by(torch.full((130,), -9)):  # a query alone with its key has nothing to lose
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-5)


@pytest.mark.not_interpreted("float64 is left to the reference")
@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(in_use: Implementation, name: str) -> None:
    query, keys, labels, scale = make_inputs(4, 6, 5, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (query, keys, scale / 4)]
    loss = ours(in_use, name)
    assert torch.autograd.gradcheck(lambda q, k, s: loss(q, k, labels, s), leaves)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation under it returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.not_interpreted("what the launchers allocate: test_triton_losses_compiled.py, at a size that matters")
def test_the_logits_are_never_whole(in_use: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", 4096)
    rows, count, size = 300, 400, 8
    query, keys, labels, scale = (tensor.to(in_use.device) for tensor in make_inputs(rows, count, size))
    ours, groups = torch.ops.cmai_fast, some_groups(count).to(in_use.device)
    with LargestTensor() as largest:
        loss, *lse = ours.info_nce(query, keys, labels, scale, True)
        ours.info_nce_backward(loss, query, keys, labels, scale, *lse)
        loss, *lse = ours.info_nce(query, keys, labels, scale, True, groups)
        ours.info_nce_backward(loss, query, keys, labels, scale, *lse, groups)
    assert 0 < largest.elements <= 4096 < rows * count
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda nothing: nothing):
        ops.info_nce(query.requires_grad_(), keys, labels, scale)
    assert saved and sum(saved) <= (rows + count) * size + 2 * rows + 1


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("name", LOSSES)
def test_large_scale_does_not_overflow(in_use: Implementation, name: str) -> None:
    query, keys, labels, scale = make_inputs(5, 9, 4)
    got = value_and_gradients(ours(in_use, name), query, keys, labels, 700 * scale, device=in_use.device)
    right = value_and_gradients(plain(name), query.double(), keys.double(), labels, 700 * scale)
    # float32 knows a logit of 1e4 to 1e-3, and its exp as well; three TF32 products know them to 1e-2.
    known = {"rtol": 2e-2, "atol": 2e-2} if in_use.device == "cuda" else {"rtol": 2e-3, "atol": 2e-3}
    for mine, exact in zip(got, right, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), **known)


# In the interpreter NaN once: no branch of a kernel looks at it, and the walk over several tiles holds that over one.
@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize(
    "chunk, bad",
    [
        (chunk, bad)
        for chunk in ("one chunk", "many chunks")
        for bad in (float("inf"), float("nan"))
        if not INTERPRETED or math.isinf(bad) or chunk == "many chunks"
    ],
    indirect=["chunk"],
)
def test_what_is_not_finite_stays_in_its_own_row(in_use: Implementation, chunk: None, bad: float) -> None:
    query, keys, labels, scale = (tensor.to(in_use.device) for tensor in make_inputs(140, 150, 6))
    grad, ours = torch.ones((), device=in_use.device), torch.ops.cmai_fast

    def run() -> tuple[Tensor, ...]:
        _, row_lse, _ = ours.info_nce(query, keys, labels, scale, False)
        column_lse = ours.info_nce(query, keys, labels, scale, True)[2]
        backward = ours.info_nce_backward(grad, query, keys, labels, scale, row_lse, column_lse[:0])
        return row_lse, column_lse, backward[0]

    before = run()
    query[131, 2] = bad
    by_query = run()
    others = torch.arange(140, device=in_use.device) != 131
    for number in (0, 2):  # per query
        torch.testing.assert_close(by_query[number][others], before[number][others])
        assert math.isinf(bad) or by_query[number][131].isnan().any()
    query[131, 2] = 0.5
    before = run()
    keys[77, 2] = bad
    by_key = run()
    others = torch.arange(150, device=in_use.device) != 77
    torch.testing.assert_close(by_key[1][others], before[1][others])
    assert math.isinf(bad) or by_key[1][77].isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch_is_zero_with_zero_gradients(in_use: Implementation, name: str) -> None:
    for tensor in value_and_gradients(ours(in_use, name), *make_inputs(0, 3, 4), device=in_use.device):
        assert not tensor.any()


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("name", LOSSES)
def test_non_contiguous_inputs(in_use: Implementation, name: str) -> None:
    inputs, loss, operator = make_inputs(6, 8, 10), ours(in_use, name), in_use("info_nce")
    right = value_and_gradients(loss, *inputs, device=in_use.device)

    def strided(query: Tensor, keys: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        options = dict(options_of(name, len(keys), query.device))  # the cached one serves other tests
        if options["groups"] is not None:
            options["groups"] = options["groups"].repeat_interleave(2)[::2]
        apart = labels.repeat_interleave(2)[::2]
        return operator(query.T.contiguous().T, keys.T.contiguous().T, apart, scale, **options)

    torch.testing.assert_close(value_and_gradients(strided, *inputs, device=in_use.device), right)


@pytest.mark.usefixtures("carried")
def test_a_log_sum_exp_that_is_not_contiguous(in_use: Implementation) -> None:
    query, keys, labels, scale = (tensor.to(in_use.device) for tensor in make_inputs(6, 8, 10))
    loss, *lse = torch.ops.cmai_fast.info_nce(query, keys, labels, scale, True)
    right = torch.ops.cmai_fast.info_nce_backward(loss, query, keys, labels, scale, *lse)
    apart = [values.repeat_interleave(2)[::2] for values in lse]
    torch.testing.assert_close(torch.ops.cmai_fast.info_nce_backward(loss, query, keys, labels, scale, *apart), right)


def test_dtypes() -> None:
    query, keys, labels, scale = make_inputs(6, 8, 10)
    half = value_and_gradients(ops.info_nce, query.bfloat16(), keys, labels, scale.double())
    assert [tensor.dtype for tensor in half] == [torch.float64, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(in_use: Implementation, name: str) -> None:
    inputs, loss = make_inputs(6, 8, 10), ours(in_use, name)
    right = value_and_gradients(loss, *inputs, device=in_use.device)
    with torch.autocast(in_use.device, torch.bfloat16):
        got = value_and_gradients(loss, *inputs, device=in_use.device)
    for mine, expected in zip(got, right, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_come_in_the_dtypes_of_the_inputs(
    in_use: Implementation, name: str, scale_dtype: torch.dtype
) -> None:
    query, keys, labels, scale = make_inputs(6, 8, 10, dtype=torch.float16)
    got = value_and_gradients(ours(in_use, name), query, keys, labels, scale.to(scale_dtype), device=in_use.device)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.float16, torch.float16, scale_dtype]


@pytest.mark.usefixtures("carried")
@pytest.mark.parametrize("name", LOSSES)
def test_opcheck(in_use: Implementation, name: str) -> None:
    query, keys, labels, scale = (tensor.to(in_use.device) for tensor in make_inputs(4, 6, 5))
    symmetric, groups = options_of(name, 6, in_use.device).values()
    lse = torch.ops.cmai_fast.info_nce(query, keys, labels, scale, symmetric, groups)[1:]
    backward = (torch.ones((), device=in_use.device), query, keys, labels, scale, *lse, groups)
    torch.library.opcheck(torch.ops.cmai_fast.info_nce_backward.default, backward)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, keys, scale)]
    forward = (*leaves[:2], labels, leaves[2], symmetric, groups)
    torch.library.opcheck(torch.ops.cmai_fast.info_nce.default, forward)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_a_cuda_graph_can_capture_it(name: str) -> None:
    """So nothing is read back to the host: not the scale, and not whether the labels are right."""
    loss = ours(Implementation(lambda operator: getattr(ops, operator), "cuda"), name)
    inputs = [tensor.cuda() for tensor in make_inputs(130, 67, 48)]
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor.is_floating_point()]

    def run() -> list[Tensor]:
        out = loss(*inputs)
        return [out, *torch.autograd.grad(out, leaves)]

    # Detached: a graph of the default stream that is still alive would be joined by the captured one.
    right = [tensor.detach().clone() for tensor in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.detach().zero_()
    graph.replay()
    for mine, expected in zip(captured, right, strict=True):
        assert torch.equal(mine, expected), "and the sums are made in one order"


def test_second_derivative_is_refused() -> None:
    query, keys, labels, scale = make_inputs(2, 3, 4)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(ops.info_nce(query, keys, labels, scale), query, create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("label", [-1, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_label_out_of_range_is_named(in_use: Implementation, name: str, label: int) -> None:
    if in_use.device == "cuda":
        pytest.skip("there the device's own assertion ends the process's use of the GPU: see the next test")
    query, keys, labels, scale = make_inputs(4, 5, 3)
    labels[2] = label
    with pytest.raises(RuntimeError, match=f"labels hold {label}, expected row numbers of keys, 0 to 4"):
        ours(in_use, name)(query, keys, labels, scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_label_out_of_range_is_refused_on_a_gpu(name: str) -> None:
    extra = ", symmetric=True" if "symmetric" in name else ""
    extra += ", groups=torch.arange(5, device='cuda')" if "grouped" in name else ""
    code = (
        "import torch, cmai_fast.ops as ops; q, k = torch.rand(4, 3, device='cuda'), torch.rand(5, 3, device='cuda');"
        "labels = torch.tensor([0, 1, 5, 2], device='cuda'); scale = torch.tensor(9.0, device='cuda');"
        f"print(ops.info_nce(q, k, labels, scale{extra}).item())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode and not done.stdout and "device-side assert" in done.stderr, done.stderr


def test_wrong_arguments_are_named() -> None:
    query, keys, labels, scale = make_inputs(4, 5, 3)
    with pytest.raises(RuntimeError, match=r"keys has shape \(5, 2\), expected \(M, 3\)"):
        ops.info_nce(query, keys[:, :2], labels, scale)
    with pytest.raises(RuntimeError, match=r"labels has dtype torch.int32"):
        ops.info_nce(query, keys, labels.int(), scale)
    with pytest.raises(RuntimeError, match=r"scale has shape \(1,\)"):
        ops.info_nce(query, keys, labels, scale[None])
    with pytest.raises(RuntimeError, match=r"groups has shape \(4,\), expected \(5,\) \(one per row of keys\)"):
        ops.info_nce(query, keys, labels, scale, groups=labels)
    with pytest.raises(RuntimeError, match=r"groups has dtype torch.int32, expected torch.int64"):
        ops.info_nce(query, keys, labels, scale, groups=torch.arange(5).int())
