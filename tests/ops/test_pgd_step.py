"""The PGD steps: the operator in use and the reference, against float64 and against their own promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmai_fast import ops
from cmai_fast.ops import reference
from implementations import INTERPRETED, Implementation

STEPS = ["pgd_linf_step_", "pgd_l2_step_"]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
# The kernels work in blocks of 1024 or 2048 elements: sizes below, at, just above and far from a multiple. In rows that
# are no multiple of 16 elements nothing is aligned.
SHAPES = [(1, 3, 1, 1), (3, 3, 7, 5), (2, 3, 32, 64), (5, 3, 3, 683), (2, 3, 65, 97)]
# The gradient's dtype and that of the clean image. They do not meet in a kernel: each is converted where it is loaded.
# Triton's interpreter, which is slow, so gets each of them once, at every shape.
DTYPES = [
    (grad, clean)
    for grad in (torch.float32, torch.bfloat16, torch.float16)
    for clean in (torch.float32, torch.uint8)
    if not INTERPRETED or (clean == torch.uint8) == (grad == torch.bfloat16)
]

Case = dict[str, Any]


def make_case(
    shape: tuple[int, ...],
    norm: str,
    *,
    grad: torch.dtype = torch.float32,
    clean: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A step whose rows end partly inside, partly outside of the ball, and whose pixels partly touch the box."""
    generator = torch.Generator().manual_seed(seed)
    rows, count = shape[0], torch.Size(shape[1:]).numel()
    pixels = torch.rand(shape, generator=generator).mul(1.2).sub(0.1).clamp(0, 1)
    if clean == torch.uint8:
        pixels = (pixels * 255).round() / 255
    size = 0.05 if norm == "linf" else 0.05 * count**0.5
    eps = size * (0.5 + torch.rand(rows, generator=generator))
    noise = torch.rand(shape, generator=generator) * 2 - 1
    return {
        "adv": (pixels + 0.04 * noise).clamp(0, 1),
        "grad": (torch.randn(shape, generator=generator) * 1e-3).to(grad),
        "clean": (pixels * 255).round().to(clean) if clean == torch.uint8 else pixels,
        "eps": eps,
        "step": eps * 2 * torch.rand(rows, generator=generator),
        "mean": torch.tensor(MEAN),
        "std": torch.tensor(STD),
        "model_input": torch.zeros(shape, dtype=grad),
    }


def norm_of(name: str) -> str:
    return "linf" if "linf" in name else "l2"


def in_float64(case: Case) -> Case:
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.items()}
    if wide["clean"].dtype == torch.uint8:
        wide["clean"] = wide["clean"].double() / 255
    return wide


def clone(case: Case) -> Case:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in case.items()}


def run(step: Any, case: Case) -> tuple[Tensor, Tensor]:
    """adv and model_input after the step; `case` is left as it is."""
    case = clone(case)
    step(**case)
    return case["adv"], case["model_input"]


def assert_same_model_input(implementation: Implementation, got: Tensor, right: Tensor) -> None:
    """To the bit; to a unit in the last place where an implementation is known to truncate."""
    assert got.dtype == right.dtype
    if got.dtype == torch.bfloat16 and implementation.garbles_bfloat16:
        assert ((got.view(torch.int16).int() - right.view(torch.int16).int()).abs() <= 1).all()
    else:
        assert torch.equal(got, right)


def assert_in_ball(name: str, adv: Tensor, clean: Tensor, eps: Tensor) -> None:
    delta = (adv.double() - clean.double()).flatten(1)
    if norm_of(name) == "linf":
        # Pixels below 1 are rounded by at most 2^-25, in clean +- eps; so is eps itself.
        assert (delta.abs().amax(1) <= eps.double() + 2**-24).all()
    else:
        assert (delta.norm(dim=1) <= eps.double() * (1 + 1e-6) + 2**-24 * delta.shape[1] ** 0.5).all()


# Not L_inf in the interpreter: its bits are those of the reference (below), whose error this test has measured here.
@pytest.mark.parametrize("name", STEPS[1:] if INTERPRETED else STEPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grad, clean", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(
    implementation: Implementation, name: str, shape: tuple[int, ...], grad: torch.dtype, clean: torch.dtype
) -> None:
    case = make_case(shape, norm_of(name), grad=grad, clean=clean)
    plain = getattr(reference, name)
    exact = run(plain, in_float64(case))
    for got, by_plain, right in zip(run(implementation(name), case), run(plain, case), exact, strict=True):
        truncated = got.dtype == torch.bfloat16 and implementation.garbles_bfloat16
        spare = 2.0**-7 * right.abs() if truncated else 0  # a unit in the last place
        error, allowed = ((got.double() - right).abs() - spare).max(), (by_plain.double() - right).abs().max()
        assert error <= 2 * allowed + 2**-24, f"error {error:.3e}, plain PyTorch {allowed:.3e}"
        assert allowed < (1e-6 if got.dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grad, clean", DTYPES)
def test_linf_kernels_give_the_very_bits_of_the_reference(
    kernel: Implementation, shape: tuple[int, ...], grad: torch.dtype, clean: torch.dtype
) -> None:
    case = make_case(shape, "linf", grad=grad, clean=clean)
    adv, model_input = run(kernel("pgd_linf_step_"), case)
    right, right_input = run(reference.pgd_linf_step_, case)
    assert torch.equal(adv, right)
    assert_same_model_input(kernel, model_input, right_input)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written_as_pytorch_does(kernel: Implementation, dtype: torch.dtype) -> None:
    """Every half as a gradient (by its L2 step); results that round to normal, subnormal, huge and infinite ones."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.abs() < 1e37].view(1, -1)
    if dtype == torch.bfloat16 and kernel.garbles_bfloat16:
        every = every[(every == 0) | (every.abs() >= torch.finfo(dtype).tiny)].view(1, -1)
    size = torch.tensor([float(every.double().norm())])  # so that a step moves by the gradient itself
    clean = torch.zeros(every.shape)
    case = {"adv": clean.clone(), "grad": every, "clean": clean, "eps": 2 * size, "step": size}
    case |= {"lower": -float("inf"), "upper": float("inf")}
    kernel("pgd_l2_step_")(**case)
    torch.testing.assert_close(case["adv"], every.float(), rtol=1e-6, atol=0)

    generator = torch.Generator().manual_seed(0)
    adv = torch.rand((3, 5, 700), generator=generator) - 0.5
    std = torch.tensor([1e-8, 1e-6, 1.0, 1e5, 1e7])
    case = {"adv": adv, "grad": torch.zeros_like(adv), "clean": adv.clone(), "eps": torch.ones(3), "lower": -1.0}
    case |= {"step": torch.ones(3), "mean": torch.zeros(5), "std": std, "model_input": torch.zeros(adv.shape).to(dtype)}
    kernel("pgd_linf_step_")(**case)
    assert_same_model_input(kernel, case["model_input"], (adv / std[:, None]).to(dtype))
    assert case["model_input"].isinf().any() == (dtype == torch.float16)


def test_linf_by_hand(implementation: Implementation) -> None:
    adv = torch.tensor([[0.5, 0.5, 0.5, 0.95, 0.59]])
    clean = torch.tensor([[0.5, 0.5, 0.5, 0.95, 0.50]])
    grad = torch.tensor([[3.0, -1e-30, 0.0, 1.0, 1.0]])
    implementation("pgd_linf_step_")(adv, grad, clean, torch.tensor([0.1]), torch.tensor([0.08]))
    torch.testing.assert_close(adv, torch.tensor([[0.58, 0.42, 0.5, 1.0, 0.6]]))


def test_l2_by_hand(implementation: Implementation) -> None:
    clean = torch.full((2, 2), 0.5)
    adv = clean.clone()
    # In pixels the gradient is (3, 4): the first row moves by step, the second is cut at eps.
    grad, std = torch.tensor([[0.6, 0.4]]).repeat(2, 1), torch.tensor([0.2, 0.1])
    implementation("pgd_l2_step_")(
        adv, grad, clean, torch.tensor([0.5, 0.05]), torch.tensor([0.1, 0.1]), mean=torch.zeros(2), std=std
    )
    torch.testing.assert_close(adv, torch.tensor([[0.56, 0.58], [0.53, 0.54]]))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_l2_direction_does_not_depend_on_the_size_of_the_gradient(implementation: Implementation, scale: float) -> None:
    case = make_case((2, 3, 8, 8), "l2")
    right, _ = run(implementation("pgd_l2_step_"), {**case, "grad": case["grad"] * 1e3})
    got, _ = run(implementation("pgd_l2_step_"), {**case, "grad": case["grad"] * 1e3 * scale})
    torch.testing.assert_close(got, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=8 if INTERPRETED else 25, deadline=None)
@given(data=st.data())
def test_result_is_inside_ball_and_box(in_use: Implementation, name: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4), label="shape"))
    seed = data.draw(st.integers(0, 2**31), label="seed")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), label="grad")
    radius = data.draw(st.floats(0, 2, width=32), label="eps")
    step = data.draw(st.floats(0, 4, width=32), label="step")
    lower, upper = data.draw(st.sampled_from([(0.0, 1.0), (0.25, 0.75)]), label="box")
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=generator).clamp(lower, upper)
    adv = torch.rand(shape, generator=generator)
    grad = torch.randn(shape, generator=generator).to(dtype)
    eps = torch.full(shape[:1], radius)
    in_use(name)(adv, grad, clean, eps, torch.full(shape[:1], step), lower=lower, upper=upper)
    assert ((adv >= lower) & (adv <= upper)).all()
    assert_in_ball(name, adv, clean, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_model_input_is_the_normalised_result(implementation: Implementation, name: str, dtype: torch.dtype) -> None:
    case = make_case((3, 3, 7, 5), norm_of(name))
    case["model_input"] = case["model_input"].to(dtype)
    adv, model_input = run(implementation(name), case)
    mean, std = case["mean"].view(3, 1, 1), case["std"].view(3, 1, 1)
    assert_same_model_input(implementation, model_input, ((adv - mean) / std).to(dtype))


@pytest.mark.parametrize("name", STEPS)
def test_inactive_rows_are_untouched(implementation: Implementation, name: str) -> None:
    case = make_case((4, 3, 9, 9), norm_of(name))
    case["active"] = torch.tensor([True, False, True, False])
    case["model_input"].fill_(7)
    case["adv"][1, 0, 0, 0] = 3.0  # outside of ball and box, and still none of the step's business
    adv, model_input = run(implementation(name), case)
    stays = ~case["active"]
    assert torch.equal(adv[stays], case["adv"][stays])
    assert (model_input[stays] == 7).all()
    everyone = {key: value for key, value in case.items() if key != "active"}
    assert torch.equal(adv[~stays], run(implementation(name), everyone)[0][~stays])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", STEPS)
def test_bad_gradients_stay_in_their_row(implementation: Implementation, name: str, bad: float) -> None:
    step = implementation(name)
    case = make_case((3, 3, 9, 9), norm_of(name))
    right, _ = run(step, case)
    spoiled = clone(case)
    spoiled["grad"][1, 2, 4, 4] = bad
    adv, model_input = run(step, spoiled)
    assert torch.equal(adv[[0, 2]], right[[0, 2]])
    assert adv.isfinite().all() and model_input.isfinite().all()
    assert_in_ball(name, adv, case["clean"], case["eps"])
    if math.isnan(bad):
        zeroed = clone(case)
        zeroed["grad"][1, 2, 4, 4] = 0
        assert torch.equal(adv, run(step, zeroed)[0])
    elif norm_of(name) == "l2":
        still = clone(case)
        still["step"][1] = 0
        assert torch.equal(adv, run(step, still)[0])


@pytest.mark.parametrize("name", STEPS)
def test_zero_gradient_does_not_move_a_row_in_the_ball(implementation: Implementation, name: str) -> None:
    case = make_case((2, 3, 5, 5), norm_of(name))
    case["grad"].zero_()
    case["eps"].fill_(10)
    adv, _ = run(implementation(name), case)
    assert torch.equal(adv, case["adv"])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("name", STEPS)
def test_empty_batch(in_use: Implementation, name: str, shape: tuple[int, ...]) -> None:
    adv, _ = run(in_use(name), make_case(shape, norm_of(name)))
    assert adv.shape == shape


@pytest.mark.parametrize("strided", ["adv", "grad", "clean", "model_input"])
@pytest.mark.parametrize("name", STEPS)
def test_non_contiguous_tensors(in_use: Implementation, name: str, strided: str) -> None:
    case = make_case((2, 3, 6, 8), norm_of(name))
    right = run(getattr(reference, name), case)
    buffer = torch.full((2, 3, 6, 16), 5.0)
    case[strided] = buffer[..., ::2].copy_(case[strided])
    in_use(name)(**case)  # not `run`: a clone would be dense
    torch.testing.assert_close((case["adv"], case["model_input"]), right, atol=1e-6, rtol=0)
    assert (buffer[..., 1::2] == 5).all()


@pytest.mark.parametrize("name", STEPS)
def test_channels_last(in_use: Implementation, name: str) -> None:
    case = make_case((2, 3, 6, 8), norm_of(name))
    right = run(getattr(reference, name), case)
    case = {k: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in case.items()}
    torch.testing.assert_close(run(in_use(name), case), right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", STEPS)
def test_result_does_not_depend_on_the_batch(implementation: Implementation, name: str) -> None:
    case = make_case((3, 3, 32, 145), norm_of(name))  # more than one partial sum a row
    adv, _ = run(implementation(name), case)
    alone = {key: value if key in ("mean", "std") else value[1:2] for key, value in case.items()}
    assert torch.equal(run(implementation(name), alone)[0][0], adv[1])


@pytest.mark.not_interpreted("it loads element by element, wherever they are")
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_result_does_not_depend_on_the_alignment(kernel: Implementation, name: str, momentum: bool) -> None:
    case = make_case((2, 3, 64, 66), norm_of(name), grad=torch.float16)
    case = with_velocity(case) if momentum else case
    right, moved = clone(case), clone(case)
    for key, value in case.items():
        if isinstance(value, Tensor) and value.dim() == 4:  # an element further than the allocator's boundary
            moved[key] = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
    kernel(name)(**right)
    kernel(name)(**moved)
    for key, value in right.items():
        assert not isinstance(value, Tensor) or torch.equal(moved[key], value), key


@pytest.mark.parametrize("name", STEPS)
def test_result_does_not_depend_on_the_threads(name: str) -> None:
    case = make_case((6, 3, 128, 129), norm_of(name))
    adv, _ = run(getattr(ops, name), case)
    torch.set_num_threads(2)  # the fixture sets it back
    assert torch.equal(run(getattr(ops, name), case)[0], adv)


# What stands for the images (2, 3, 6, 8) in memory: a view back onto images, and how many runs of channels a row has.
LAYOUTS = {
    "channels last": (lambda image: image.permute(0, 2, 3, 1), 48),
    "one unit a row": (lambda image: image.unsqueeze(1), 1),
    "patches of 2 x 4": (lambda image: image.view(2, 3, 3, 2, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 24), 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STEPS)
def test_layouts_of_the_same_images_give_the_same_step(implementation: Implementation, name: str, layout: str) -> None:
    case = make_case((2, 3, 6, 8), norm_of(name))
    right = run(getattr(reference, name), case)
    arrange, patches = LAYOUTS[layout]
    images = ("adv", "grad", "clean", "model_input")
    moved = {key: arrange(value).contiguous() if key in images else value for key, value in case.items()}
    right = [arrange(value) for value in right]
    for got, expected in zip(run(implementation(name), {**moved, "patches": patches}), right, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def with_velocity(case: Case, seed: int = 1) -> Case:
    velocity = torch.randn(case["adv"].shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
    return case | {"velocity": velocity, "decay": 0.9}


# In the interpreter each shape with one of the two: the kernels of the velocity differ by the dtype in a load alone.
@pytest.mark.parametrize(
    "shape, grad",
    [
        (shape, grad)
        for i, shape in enumerate(SHAPES)
        for j, grad in enumerate([torch.float32, torch.float16])
        if not INTERPRETED or i % 2 == j
    ],
)
@pytest.mark.parametrize("name", STEPS)
def test_momentum_is_that_of_mi_fgsm(
    implementation: Implementation, name: str, shape: tuple[int, ...], grad: torch.dtype
) -> None:
    case = with_velocity(make_case(shape, norm_of(name), grad=grad))
    case["grad"][0] *= 0  # a row without a gradient goes on along its velocity
    pixels = case["grad"].double() / case["std"].double().view(3, 1, 1)
    size = pixels.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
    velocity = 0.9 * case["velocity"].double() + torch.where(size > 0, pixels / size, 0)
    plain = {key: value for key, value in case.items() if key not in ("velocity", "decay")}
    # The step divides the gradient by std, which the velocity has behind it.
    right = run(getattr(reference, name), {**plain, "grad": velocity * case["std"].double().view(3, 1, 1)})
    after = clone(case)
    implementation(name)(**after)
    torch.testing.assert_close(after["velocity"].double(), velocity, atol=1e-9, rtol=2e-6)
    for got, expected in zip((after["adv"], after["model_input"]), right, strict=True):
        tight = {"atol": 2e-6, "rtol": 0} if got.dtype == torch.float32 else {}
        torch.testing.assert_close(got, expected, **tight)


@pytest.mark.parametrize("name", STEPS)
def test_an_infinite_gradient_leaves_the_velocity_to_decay(implementation: Implementation, name: str) -> None:
    case = with_velocity(make_case((3, 3, 9, 9), norm_of(name)))
    case["grad"][1, 0, 0, 0] = float("inf")
    case["active"] = torch.tensor([True, True, False])
    after = clone(case)
    implementation(name)(**after)
    torch.testing.assert_close(after["velocity"][1], 0.9 * case["velocity"][1])
    assert torch.equal(after["velocity"][2], case["velocity"][2])
    assert after["adv"].isfinite().all()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_bad_gradients_are_counted(implementation: Implementation, name: str, momentum: bool) -> None:
    case = make_case((4, 3, 41, 53), norm_of(name))  # more than one block a row
    case = with_velocity(case) if momentum else case
    case["grad"][0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    case["grad"][0, 2, 40, 52] = float("nan")
    case["grad"][2, 1, 7, 7] = float("inf")
    case["grad"][3] = float("nan")
    case["active"] = torch.tensor([True, True, True, False])
    case["nonfinite"] = torch.tensor([100, 0, 0, 7])
    implementation(name)(**case)
    assert case["nonfinite"].tolist() == [104, 0, 1, 7]


@pytest.mark.parametrize("name", STEPS)
def test_backward_through_overwritten_pixels_is_refused(kernel: Implementation, name: str) -> None:
    case = {key: value.to(kernel.device) for key, value in make_case((1, 3, 4, 4), norm_of(name)).items()}
    case["adv"].requires_grad_()
    loss = (case["adv"] ** 2).sum()
    kernel.operator(name)(**case)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", STEPS)
def test_pixels_that_came_of_a_differentiable_operation_are_refused(in_use: Implementation, name: str) -> None:
    case = {key: value.to(in_use.device) for key, value in make_case((1, 3, 4, 4), norm_of(name)).items()}
    case["adv"] = case["adv"].requires_grad_() * 1.0
    before = case["adv"].clone()
    with pytest.raises(RuntimeError, match=r"adv has a grad_fn \(MulBackward0\).*pass adv.detach\(\)"):
        in_use(name)(**case)
    assert torch.equal(case["adv"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STEPS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    case = {key: value.to(dtype) for key, value in make_case((2, 3, 4, 4), norm_of(name)).items()}
    positional = [case.pop(key) for key in ("adv", "grad", "clean", "eps", "step")]
    operator = getattr(torch.ops.cmai_fast, name).default
    torch.library.opcheck(operator, (*positional, torch.tensor([True, False])), case)
    torch.library.opcheck(operator, tuple(positional), {})


WRONG = [
    ("adv", torch.rand(2, 3, 4, 4).half(), "adv has dtype torch.float16"),
    ("adv", torch.rand(2), r"expected \(N, \.\.\.\)"),
    ("clean", torch.rand(2, 3, 4, 5), r"clean has shape \(2, 3, 4, 5\), expected \(2, 3, 4, 4\)"),
    ("clean", torch.rand(2, 3, 4, 4).double(), "clean has dtype torch.float64, expected torch.float32 or torch.uint8"),
    ("grad", torch.ones(2, 3, 4, 4, dtype=torch.int64), "grad has dtype torch.int64"),
    ("eps", torch.tensor(0.1), r"eps has shape \(\)"),
    ("step", torch.rand(3), r"step has shape \(3,\), expected \(2,\)"),
    ("active", torch.ones(2), "active has dtype torch.float32"),
    ("mean", None, "got std alone"),
    ("std", torch.rand(1), r"std has shape \(1,\), expected \(3,\) like mean"),
    ("model_input", torch.rand(1, 3, 4, 4), "model_input has shape"),
    ("lower", 2.0, "pixel box is empty"),
    (
        "velocity",
        torch.rand(2, 3, 4, 4).half(),
        r"velocity has dtype torch.float16, expected torch.float32 \(like adv\)",
    ),
    ("decay", -1.0, "decay is -1.0, expected a finite number of at least 0"),
    ("nonfinite", torch.zeros(2), "nonfinite has dtype torch.float32, expected torch.int64"),
    ("patches", 0, "patches is 0, expected at least 1"),
    ("patches", 5, r"a row of adv has 48 elements, expected a multiple of patches \* channels = 5 \* 3"),
    ("clean", torch.zeros(2, 3, 4, 4, dtype=torch.int32), "clean has dtype torch.int32, expected torch.float32 or"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
@pytest.mark.parametrize("name", STEPS)
def test_wrong_arguments_are_named(name: str, key: str, value: Any, message: str) -> None:
    case = make_case((2, 3, 4, 4), norm_of(name))
    case[key] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(**case)


def test_as_many_means_as_channels() -> None:
    case = make_case((2, 3, 4, 4), "linf") | {"mean": torch.zeros(4), "std": torch.ones(4)}
    with pytest.raises(RuntimeError, match=r"mean has shape \(4,\), expected \(3,\): one per channel, dim 1 of adv"):
        ops.pgd_linf_step_(**case)


@pytest.mark.parametrize("name", STEPS)
def test_one_tensor_for_two_roles_is_refused(name: str) -> None:
    case = make_case((2, 3, 4, 4), norm_of(name))
    with pytest.raises(RuntimeError, match="adv and clean are the same tensor"):
        getattr(ops, name)(**{**case, "clean": case["adv"]})
    with pytest.raises(RuntimeError, match="adv and model_input are the same tensor"):
        getattr(ops, name)(**{**case, "model_input": case["adv"]})
    getattr(ops, name)(**{**case, "step": case["eps"]})  # both are only read
    with pytest.raises(RuntimeError, match="grad and velocity are the same tensor"):
        getattr(ops, name)(**{**case, "step": case["eps"], "velocity": case["grad"]})
