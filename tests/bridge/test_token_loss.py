"""Losses without all logits: they are those of the plain path, to rounding, and the layer never sees all tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cmai_fast.attacks import Victim
from cmai_fast.bridge import bridge_of, is_right, output_layer, task_loss
from cmai_fast.bridge.output_layer import OutputLayer
from cmai_fast.bridge.replaced import replaced
from cmai_fast.bridge.token_loss import token_losses
from cmai_fast.mbat import maximise
from cmai_fast.pixels import PixelSpace
from cmai_fast.threat import ThreatModel
from families import FAMILIES, IMAGE, Family

generative = pytest.mark.parametrize("family", [f for f in FAMILIES if f.kind == "generative"], ids=lambda f: f.name)
llava = next(f for f in FAMILIES if f.name == "LLaVA")


def plain_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def problem(
    dtype: torch.dtype, tokens: int = 53, bias: bool = True, width: int = 24
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Output layer, hidden states, targets and the weights of the tokens in a sum; the same numbers in any dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(tokens)
        head = nn.Linear(width, 301, bias=bias).to(torch.bfloat16).to(dtype)
        hidden = torch.randn(tokens, width).to(torch.bfloat16).to(dtype).requires_grad_()
        return head, hidden, torch.randint(0, 301, (tokens,)), torch.rand(tokens) + 0.1


def results(losses: Any, dtype: torch.dtype, trained: bool, tokens: int = 53, bias: bool = True) -> list[Tensor]:
    head, hidden, targets, weights = problem(dtype, tokens, bias)
    head.requires_grad_(trained)
    loss = losses(head, hidden, targets)
    loss = loss[0] if isinstance(loss, tuple) else loss
    grads = torch.autograd.grad((loss * weights.to(loss)).sum(), [hidden, *(head.parameters() if trained else ())])
    return [loss.detach(), *grads]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, bias", [(1, True), (16, False), (53, True), (800, False)])
def test_losses_and_gradients_err_no_more_than_twice_the_plain_path(dtype, trained, tokens, bias):
    exact = results(plain_losses, torch.float64, trained, tokens, bias)
    plain = results(plain_losses, dtype, trained, tokens, bias)
    got = results(token_losses, dtype, trained, tokens, bias)
    for right, usual, ours in zip(exact, plain, got, strict=True):
        assert ours.dtype == usual.dtype and ours.shape == usual.shape
        slack = torch.finfo(ours.dtype).eps / 2 * float(right.abs().max())  # where the plain path happens to be exact
        assert (ours - right).abs().max() <= 2 * (usual - right).abs().max() + slack
        assert right.abs().max() > 0.01


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_each_token_has_its_own_weight(trained):
    for exact, ours in zip(
        results(plain_losses, torch.float64, trained), results(token_losses, torch.float64, trained), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_layer_never_sees_all_tokens(trained):
    head, hidden, targets, _ = problem(torch.float32, 100)
    head.requires_grad_(trained)
    seen, linear = [], head.forward
    head.forward = lambda h: seen.append(len(h)) or linear(h)  # type: ignore[func-returns-value]
    losses, right = token_losses(head, hidden, targets)
    assert seen == [16] * 6 + [4]
    losses.sum().backward()
    assert len(seen) == (14 if trained else 7) and max(seen) == 16
    assert torch.equal(right, head(hidden).argmax(-1) == targets) and not right.requires_grad
    with torch.no_grad():
        assert torch.equal(token_losses(head, hidden, targets)[0], losses)


def test_a_trained_layer_before_a_hidden_state_that_needs_no_gradient():
    head, hidden, targets, weights = problem(torch.float64)
    (token_losses(head, hidden.detach(), targets)[0] * weights).sum().backward()
    expected = torch.autograd.grad((plain_losses(head, hidden, targets) * weights).sum(), list(head.parameters()))
    for p, grad in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-13)


def test_mixed_precision_holds_in_the_backward_pass_too():
    def half(losses: Any) -> Any:
        def run(*args: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return losses(*args)

        return run

    seen = []

    def watched(head: Any, hidden: Tensor, targets: Tensor) -> Any:
        head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return half(token_losses)(head, hidden, targets)

    exact = results(plain_losses, torch.float64, True)
    usual, ours = results(half(plain_losses), torch.float32, True), results(watched, torch.float32, True)
    assert set(seen) == {torch.bfloat16} and len(seen) == 8
    for right, one, other in zip(exact, usual, ours, strict=True):
        assert one.dtype == other.dtype
        assert (other - right).abs().max() <= 2 * (one - right).abs().max()


@pytest.mark.parametrize("hooked", [False, True])
def test_a_lent_layer_is_given_back_with_its_hook(hooked):
    head, hidden, _, _ = problem(torch.float32)

    def hook(hidden: Tensor) -> Tensor:
        return hidden * 0

    if hooked:
        head.forward = hook
    before = head(hidden)

    def use() -> None:
        with replaced({head: lambda hidden: hidden + 1}):
            assert torch.equal(head(hidden), hidden + 1)
            raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        use()
    assert torch.equal(head(hidden), before) and head.__dict__.get("forward") is (hook if hooked else None)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From here on any logits are large; the list gets the number of tokens of each call."""
    calls: list[int] = []

    def watched(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(hidden))
        return token_losses(head, hidden, targets)

    monkeypatch.setattr(OutputLayer, "_pays", lambda *_: True)
    monkeypatch.setattr(output_layer, "token_losses", watched)
    return calls


def batch_of(family: Family, model: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    bridge = bridge_of(model)
    batch = family.batch(model, family.samples())
    image, text = bridge.inputs(batch)
    return bridge, bridge.encode_image(batch["pixel_values"].double(), **image).detach().requires_grad_(), text


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@generative
def test_a_family_has_the_losses_of_its_logits(family, trained, chunked):
    model = copy.deepcopy(family.model()).double().requires_grad_(trained).train()
    bridge, features, text = batch_of(family, model)
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    wrong = {**text, "labels": torch.where(text["labels"] > 0, (text["labels"] + 1) % 48, text["labels"])}
    weights = torch.tensor([0.2, 0.5, 0.3])
    parameters = [p for p in model.parameters() if p.requires_grad]
    for labels in (text, wrong):
        torch.set_rng_state(random)
        logits, targets = bridge.fuse(features, **labels)
        expected, right = task_loss(logits, targets), is_right(logits, targets)
        drawn = torch.get_rng_state()  # some models draw numbers that change nothing (OPT, before transformers 5.23)
        torch.set_rng_state(random)
        got, good = bridge.losses(features, **labels)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert chunked.pop() == int((targets != -100).sum())
        assert got.dtype == expected.dtype and torch.equal(good, right) and right.all() == (labels is text)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        grads, wanted = (
            torch.autograd.grad((weights * x).sum(), [features, *parameters], allow_unused=True)
            for x in (got, expected)
        )
        for grad, want in zip(grads, wanted, strict=True):
            assert (grad is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)
    assert [m.training for m in model.modules()] == modes
    assert "forward" not in model.get_output_embeddings().__dict__


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    def build() -> Any:
        model = copy.deepcopy(llava.model())
        forward = model.forward

        def own(pixel_values: Any = None, mm_encoder_outputs: Any = None, **kwargs: Any) -> Any:
            output = forward(pixel_values=pixel_values, mm_encoder_outputs=mm_encoder_outputs, **kwargs)
            output.logits = change(output.logits)
            return output

        model.forward = own
        return model

    return build


def with_dropout() -> Any:
    model = copy.deepcopy(llava.model())
    model.lm_head = nn.Sequential(nn.Dropout(0.5), model.lm_head).train()
    return model


def with_another_layer() -> Any:
    """`get_output_embeddings` names a layer that the logits do not come from."""
    model = copy.deepcopy(llava.model())
    other = copy.deepcopy(model.lm_head)
    model.get_output_embeddings = lambda: other
    return model


@pytest.mark.parametrize(
    "build",
    [
        changed(lambda logits: logits * 0.5),
        changed(lambda logits: 30 * torch.tanh(logits / 30)),
        changed(lambda logits: logits[..., :47]),
        changed(lambda logits: logits.index_fill(-1, torch.tensor([IMAGE]), -1e9)),
        with_dropout,
        with_another_layer,
    ],
    ids=["scaled", "capped", "cut", "masked", "dropout", "another"],
)
def test_logits_that_are_not_what_the_layer_gives_take_the_plain_path(build, chunked):
    bridge, features, text = batch_of(llava, build().double())
    torch.manual_seed(1)
    logits, targets = bridge.fuse(features, **text)
    bridge.losses(features, **text)
    torch.manual_seed(1)
    losses, _ = bridge.losses(features, **text)
    assert torch.equal(losses, task_loss(logits, targets)) and not chunked


def test_another_layer_is_looked_at_anew(chunked):
    model = copy.deepcopy(llava.model()).double()
    bridge, features, text = batch_of(llava, model)
    bridge.losses(features, **text)
    unused = copy.deepcopy(model.lm_head)
    model.get_output_embeddings = lambda: unused
    bridge.losses(features, **text)
    assert len(chunked) == 1


def test_sharded_models_take_the_plain_path(chunked):
    """Their processes would look at the layer at different steps, and wait for each other."""
    model = copy.deepcopy(llava.model()).double()
    bridge, features, text = batch_of(llava, model)
    model.__class__ = type("Sharded", (FSDPModule, type(model)), {})
    bridge.losses(features, **text)
    assert bridge._output._last is None and not chunked


def test_a_layer_that_reads_tokens_in_one_row_takes_the_plain_path(chunked):
    class InOneRow(nn.Linear):
        def __call__(self, hidden: Tensor) -> Tensor:
            return super().__call__(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    model = copy.deepcopy(llava.model()).double()
    model.lm_head.__class__ = InOneRow
    bridge, features, text = batch_of(llava, model)
    losses, _ = bridge.losses(features, **text)
    assert torch.equal(losses, task_loss(*bridge.fuse(features, **text))) and not chunked


def test_looking_draws_no_random_numbers(chunked, monkeypatch):
    model = copy.deepcopy(llava.model()).double().train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = []
    for large in (True, False):
        monkeypatch.setattr(OutputLayer, "_pays", lambda *_, large=large: large)
        bridge, features, text = batch_of(llava, model)
        torch.manual_seed(3)
        found.append(bridge.losses(features, **text)[0])
    assert len(chunked) == 1 and not torch.equal(found[0], bridge.losses(features, **text)[0])
    torch.testing.assert_close(*found)


def test_chunks_are_for_large_logits_and_beyond_a_trained_layers_own_gradient(chunked, monkeypatch):
    monkeypatch.undo()
    model = copy.deepcopy(llava.model())
    output, head = bridge_of(model)._output, model.lm_head  # of 16 x 48
    assert not output._pays(head, 100) and output._pays(head, (1 << 26) // 48 + 1)
    monkeypatch.setattr(output_layer, "_LARGE", 4 * 48)
    assert not output._pays(head, 15) and output._pays(head, 16)
    head.requires_grad_(False)
    assert not output._pays(head, 3) and output._pays(head, 4)


def test_an_error_of_the_model_gives_its_layer_back(chunked):
    model = copy.deepcopy(llava.model()).double()
    bridge, features, text = batch_of(llava, model)
    bridge.losses(features, **text)

    def fail(*_: Any) -> None:
        raise OSError("planted")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(OSError, match="planted"):
        bridge.losses(features, **text)
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("solver", ["pgd", "bridge"])
def test_an_attack_finds_the_same_images(solver, chunked, monkeypatch):
    model = copy.deepcopy(llava.model()).double()
    found = []
    for large in (True, False):
        monkeypatch.setattr(OutputLayer, "_pays", lambda *_, large=large: large)
        batch = llava.batch(model, llava.samples())
        objective = Victim(bridge_of(model), PixelSpace.from_processor(llava.processor), batch)
        clean = objective.pixels().double()
        found.append(maximise(objective, clean, ThreatModel("linf", 8 / 255), solver, steps=3, refreshes=1).adv)
        assert len(chunked) == (3 if solver == "pgd" else 2)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
