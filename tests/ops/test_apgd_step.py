"""The steps of Auto-PGD: against the formulas of the paper in float64, and the books they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cmai_fast import ops
from cmai_fast.ops import reference
from implementations import INTERPRETED, Implementation

STEPS = ["apgd_linf_step_", "apgd_l2_step_"]
SHAPES = [(1, 3, 1, 1), (4, 3, 7, 5), (4, 3, 41, 53)]
# The gradient's dtype and that of the clean image. They do not meet in a kernel: each is converted where it is loaded.
# Triton's interpreter, which is slow, so gets each of them once, at every shape.
DTYPES = [
    (grad, clean)
    for grad in (torch.float32, torch.bfloat16, torch.float16)
    for clean in (torch.float32, torch.uint8)
    if not INTERPRETED or (clean == torch.uint8) == (grad == torch.bfloat16)
]
IMAGES = ("adv", "previous", "grad", "top_adv", "top_grad", "model_input")

Case = dict[str, Any]


def make_case(
    shape: tuple[int, ...], name: str, *, grad: torch.dtype = torch.float32, clean: torch.dtype = torch.float32
) -> Case:
    """Rows that improved, that restart, both and neither; points inside and on the edge of ball and box."""
    generator = torch.Generator().manual_seed(0)

    def near(pixels: Tensor, size: float = 0.04) -> Tensor:
        return (pixels + size * (torch.rand(shape, generator=generator) * 2 - 1)).clamp(0, 1)

    rows, count = shape[0], torch.Size(shape[1:]).numel()
    pixels = (torch.rand(shape, generator=generator) * 255).round() / 255
    radius = (0.05 if "linf" in name else 0.05 * count**0.5) * (0.5 + torch.rand(rows, generator=generator))
    return {
        "adv": near(pixels),
        "previous": near(pixels),
        "grad": (torch.randn(shape, generator=generator) * 1e-3).to(grad),
        "top_adv": near(pixels),
        "top_grad": (torch.randn(shape, generator=generator) * 1e-3).to(grad),
        "clean": (pixels * 255).round().to(torch.uint8) if clean == torch.uint8 else pixels,
        "eps": radius,
        "step": radius * 2 * torch.rand(rows, generator=generator),
        "improved": torch.tensor([True, False, True, False])[:rows],
        "restart": torch.tensor([False, True, True, False])[:rows],
        "momentum": 0.75,
        "mean": torch.tensor([0.48, 0.46, 0.41]),
        "std": torch.tensor([0.27, 0.26, 0.28]),
        "model_input": torch.zeros(shape, dtype=grad),
    }


def clone(case: Case) -> Case:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in case.items()}


def by_the_paper(name: str, case: Case) -> dict[str, Tensor]:
    """Algorithm 1, lines 6 to 16, a row at a time in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.dtype != torch.bool else v for k, v in case.items()}
    clean = wide["clean"] / 255 if case["clean"].dtype == torch.uint8 else wide["clean"]
    std = wide["std"].view(3, 1, 1)
    out = {key: wide[key].clone() for key in IMAGES}
    for i in range(len(clean)):

        def project(image: Tensor, i: int = i) -> Tensor:
            delta, eps = image - clean[i], wide["eps"][i]
            if "linf" in name:
                delta = delta.clamp(-eps, eps)
            elif delta.norm() > eps:
                delta = delta * eps / delta.norm()
            return (clean[i] + delta).clamp(0, 1)

        if case["improved"][i]:
            out["top_adv"][i], out["top_grad"][i] = wide["adv"][i], wide["grad"][i]
        x, grad = wide["adv"][i], wide["grad"][i] / std
        if case["restart"][i]:
            x, grad = out["top_adv"][i], out["top_grad"][i] / std
        along = grad.sign() if "linf" in name else grad / grad.norm()
        z, alpha = project(x + wide["step"][i] * along), case["momentum"]
        out["adv"][i] = x
        out["previous"][i] = project(x + alpha * (z - x) + (1 - alpha) * (x - wide["previous"][i]))
    out["model_input"] = (out["previous"] - wide["mean"].view(3, 1, 1)) / std
    return out


@pytest.mark.parametrize("grad, clean", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STEPS)
def test_error_is_at_most_twice_that_of_the_reference(
    implementation: Implementation, name: str, shape: tuple[int, ...], grad: torch.dtype, clean: torch.dtype
) -> None:
    case = make_case(shape, name, grad=grad, clean=clean)
    right, got, plain = by_the_paper(name, case), clone(case), clone(case)
    implementation(name)(**got)
    getattr(reference, name)(**plain)
    for key in IMAGES:
        truncated = got[key].dtype == torch.bfloat16 and implementation.garbles_bfloat16 and key == "model_input"
        spare = 2.0**-7 * right[key].abs() if truncated else 0  # a unit in the last place
        error = ((got[key].double() - right[key]).abs() - spare).max()
        allowed = (plain[key].double() - right[key]).abs().max()
        assert error <= 2 * allowed + 2**-24, f"{key}: error {error:.3e}, plain PyTorch {allowed:.3e}"
        assert allowed < (2e-6 if key != "model_input" or grad == torch.float32 else 0.02), key


def test_linf_kernels_give_the_very_bits_of_the_reference(kernel: Implementation) -> None:
    case = make_case((4, 3, 41, 53), "linf")
    got, right = clone(case), clone(case)
    kernel("apgd_linf_step_")(**got)
    reference.apgd_linf_step_(**right)
    for key in IMAGES:
        assert torch.equal(got[key], right[key]), key


@pytest.mark.parametrize("name", STEPS)
def test_bad_gradients_are_counted_and_stay_in_their_row(implementation: Implementation, name: str) -> None:
    case = make_case((4, 3, 41, 53), name) | {"nonfinite": torch.tensor([0, 5, 0, 0])}
    right = clone(case)
    implementation(name)(**right)
    assert right["nonfinite"].tolist() == [0, 5, 0, 0]
    case["grad"][1, 0, 0, :2] = float("nan")  # restarts: not the gradient it follows, and counted all the same
    case["grad"][2, 2, 40, 52] = float("inf")
    case["top_grad"][3] = float("nan")  # neither read nor written
    implementation(name)(**case)
    assert case["nonfinite"].tolist() == [0, 7, 1, 0]
    assert torch.equal(case["previous"][[0, 1, 3]], right["previous"][[0, 1, 3]])
    assert case["previous"].isfinite().all() and case["model_input"].isfinite().all()


@pytest.mark.parametrize("name", STEPS)
def test_a_first_step_is_a_step_of_pgd(implementation: Implementation, name: str) -> None:
    case = make_case((4, 3, 7, 5), name)
    case |= {"momentum": 1.0, "restart": torch.zeros(4, dtype=torch.bool)}
    implementation(name)(**case)
    adv = case["adv"].clone()
    getattr(reference, name[1:])(adv, case["grad"], case["clean"], case["eps"], case["step"], std=case["std"],
                                 mean=case["mean"])  # fmt: skip
    torch.testing.assert_close(case["previous"], adv, atol=5e-7, rtol=0)


@pytest.mark.parametrize("name", STEPS)
def test_non_contiguous_and_empty(in_use: Implementation, name: str) -> None:
    case = make_case((4, 3, 6, 8), name)
    right = clone(case)
    getattr(reference, name)(**right)
    strided = {k: v.mT.contiguous().mT if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in case.items()}
    in_use(name)(**strided)
    for key in IMAGES:
        torch.testing.assert_close(strided[key], right[key], atol=1e-6, rtol=0)
    images = (*IMAGES, "clean")
    in_use(name)(**{k: v[:, :, :, :0] if k in images else v for k, v in case.items()})
    rows = {"eps", "step", "improved", "restart", *images}
    in_use(name)(**{k: v[:0] if k in rows else v for k, v in case.items()})


@pytest.mark.not_interpreted("it loads element by element, wherever they are")
@pytest.mark.parametrize("name", STEPS)
def test_result_does_not_depend_on_the_alignment(kernel: Implementation, name: str) -> None:
    case = make_case((4, 3, 64, 66), name)
    right, moved = clone(case), clone(case)
    for key in IMAGES:
        moved[key] = torch.empty(case[key].numel() + 1)[1:].view(case[key].shape).copy_(case[key])
    kernel(name)(**right)
    kernel(name)(**moved)
    for key in IMAGES:
        assert torch.equal(moved[key], right[key]), key


@pytest.mark.parametrize("name", STEPS)
def test_result_does_not_depend_on_the_threads(name: str) -> None:
    case = make_case((4, 3, 150, 160), name)
    alone, together = clone(case), clone(case)
    getattr(ops, name)(**alone)
    torch.set_num_threads(2)  # the fixture sets it back
    getattr(ops, name)(**together)
    for key in IMAGES:
        assert torch.equal(alone[key], together[key])


@pytest.mark.parametrize("name", STEPS)
def test_opcheck(name: str) -> None:
    case = make_case((4, 3, 4, 4), name) | {"nonfinite": torch.zeros(4, dtype=torch.int64)}
    keys = ["adv", "previous", "grad", "top_adv", "top_grad", "clean", "eps", "step", "improved", "restart", "momentum"]
    positional = tuple(case.pop(key) for key in keys)
    torch.library.opcheck(getattr(torch.ops.cmai_fast, name).default, positional, case)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("previous", torch.rand(4, 3, 4, 5), r"previous has shape \(4, 3, 4, 5\), expected \(4, 3, 4, 4\) like adv"),
        ("top_grad", torch.rand(4, 3, 4, 4).half(), "top_grad has dtype torch.float16, expected torch.float32"),
        ("improved", torch.ones(4), "improved has dtype torch.float32, expected torch.bool"),
        ("restart", torch.ones(3, dtype=torch.bool), r"restart has shape \(3,\), expected \(4,\)"),
        ("momentum", 1.5, "momentum is 1.5, expected a number from 0 to 1"),
    ],
)
@pytest.mark.parametrize("name", STEPS)
def test_wrong_arguments_are_named(name: str, key: str, value: Any, message: str) -> None:
    case = make_case((4, 3, 4, 4), name)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(**{**case, key: value})
    with pytest.raises(RuntimeError, match="adv and previous are the same tensor"):
        getattr(ops, name)(**{**case, "previous": case["adv"]})
