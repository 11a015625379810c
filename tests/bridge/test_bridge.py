from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cmai_fast.bridge import Bridge, bridge_of, is_right, task_loss
from own_answers import Case, answer_itself


@pytest.fixture(scope="module")
def case(make_tiny) -> Case:
    return answer_itself(make_tiny(), samples=4, dtype=torch.float64)


@pytest.fixture(scope="module")
def bridge(case) -> Bridge:
    return Bridge(case.model)


def pad_right(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows with their padding moved to the right."""
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    return {k: v.gather(1, order) for k, v in batch.items()}


def losses(bridge: Bridge, case: Case, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return task_loss(*bridge.fuse(bridge.encode_image(case.space.to_model(case.clean)), **batch))


@pytest.mark.parametrize("layout", ["left", "right"])
def test_image_side_and_fusion_together_are_the_model(case, bridge, layout):
    batch = case.batch(extra=2) if layout == "left" else pad_right(case.batch(extra=2))
    values = case.space.to_model(case.clean)
    with torch.no_grad():
        features = bridge.encode_image(values)
        logits, targets = bridge.fuse(features, **batch)
        whole = case.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=values
        ).logits
    assert features.shape == (4, 16, bridge.image_dim)
    shifted = batch["labels"][:, 1:]
    columns = (shifted != -100).any(0)
    assert torch.equal(targets, shifted[:, columns])
    wanted = targets != -100
    # The model counts padding as positions; rotary tables are float32 whatever the model's dtype.
    torch.testing.assert_close(logits[wanted], whole[:, :-1][:, columns][wanted], rtol=1e-5, atol=1e-5)


def test_logits_are_computed_where_labels_are_and_nowhere_else(case, bridge):
    features = bridge.encode_image(case.space.to_model(case.clean))
    logits, _ = bridge.fuse(features, **case.batch())
    assert logits.shape[1] == 2  # responses of one and two tokens, aligned at their end
    assert bridge.fuse(features[:1], **case.batch([0]))[0].shape[1] == 1


def test_task_loss_is_the_models_own_loss_sample_by_sample(case, bridge):
    together = losses(bridge, case, case.batch())
    for i in range(4):
        one = case.batch([i])
        with torch.no_grad():
            own = case.model(**one, pixel_values=case.space.to_model(case.clean[i : i + 1])).loss
        torch.testing.assert_close(together[i], own.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [None, 0, 1], ids=["right", "first token wrong", "second token wrong"])
def test_right_is_what_greedy_generation_gives(make_tiny, wrong):
    case = answer_itself(make_tiny(), samples=6)
    model = case.model
    two = [i for i in range(6) if case.answers[i] == 2]
    rows = [list(case.rows[i]) for i in two]
    if wrong is not None:
        for row in rows[::2]:
            row[wrong - 2] = 8 if row[wrong - 2] == 7 else 7  # two ordinary words
    case.rows, case.answers = rows, [2] * len(rows)
    prompts = case.batch()
    values = case.space.to_model(case.clean[two])
    generated = model.generate(
        input_ids=prompts["input_ids"][:, :-2],
        attention_mask=prompts["attention_mask"][:, :-2],
        pixel_values=values,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
    )[:, -2:]
    expected = [g == r[-2:] for g, r in zip(generated.tolist(), rows, strict=True)]
    bridge = Bridge(model)
    with torch.no_grad():
        right = is_right(*bridge.fuse(bridge.encode_image(values), **case.batch()))
    assert right.tolist() == expected
    assert expected == [wrong is None or i % 2 == 1 for i in range(len(rows))]


@pytest.mark.parametrize("layout", ["one more column", "ten more columns", "right"])
def test_fusion_does_not_depend_on_padding(case, bridge, layout):
    batch = {"one more column": case.batch(extra=1), "ten more columns": case.batch(extra=10)}.get(
        layout, pad_right(case.batch(extra=3))
    )
    torch.testing.assert_close(losses(bridge, case, batch), losses(bridge, case, case.batch()), rtol=1e-9, atol=1e-9)


def encoded(bridge: Bridge, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return bridge.encode_text(**batch)


def test_text_side_is_the_mean_hidden_state_of_the_response_without_the_image(case, bridge):
    together = encoded(bridge, case.batch(extra=3))
    assert together.shape == (4, bridge.text_dim)
    for i, (row, n) in enumerate(zip(case.rows, case.answers, strict=True)):
        ids = torch.tensor([[t for t in row if t != case.model.config.image_token_id]])
        assert len(ids[0]) == len(row) - 16
        with torch.no_grad():
            hidden = case.model.model.language_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(together[i], hidden[-n:].mean(0), rtol=1e-9, atol=1e-9)


def test_text_side_depends_neither_on_padding_nor_on_neighbours_nor_on_the_image(case, bridge):
    plain = encoded(bridge, case.batch())
    for other in (case.batch(extra=5), pad_right(case.batch(extra=5))):
        torch.testing.assert_close(encoded(bridge, other), plain, rtol=1e-9, atol=1e-9)
    for i in range(4):
        torch.testing.assert_close(encoded(bridge, case.batch([i]))[0], plain[i], rtol=1e-9, atol=1e-9)

    def fail(*_):
        raise AssertionError("the text side ran the vision tower")

    hook = case.model.model.vision_tower.register_forward_hook(fail)
    try:
        encoded(bridge, case.batch())
    finally:
        hook.remove()


def test_text_side_reads_question_and_response(case, bridge):
    plain = encoded(bridge, case.batch())
    for column in (-1, -case.answers[0] - 4):
        batch = case.batch()
        batch["input_ids"][0, column] = 7 + (batch["input_ids"][0, column] == 7)
        changed = encoded(bridge, batch)
        assert (changed[0] - plain[0]).abs().max() > 1e-3
        torch.testing.assert_close(changed[1:], plain[1:], rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_patch_of_every_image(case, bridge):
    values = case.space.to_model(case.clean).requires_grad_()
    loss = task_loss(*bridge.fuse(bridge.encode_image(values), **case.batch(extra=4)))
    (grad,) = torch.autograd.grad(loss.sum(), values)
    patches = grad.abs().unfold(2, 16, 16).unfold(3, 16, 16).sum((1, 4, 5))
    assert grad.isfinite().all() and (patches > 0).all()


def test_an_images_gradient_is_that_of_its_own_sample(case, bridge):
    values = case.space.to_model(case.clean).requires_grad_()
    loss = task_loss(*bridge.fuse(bridge.encode_image(values), **case.batch()))
    (grad,) = torch.autograd.grad(loss[1], values)
    assert grad[1].abs().sum() > 0 and grad[[0, 2, 3]].abs().sum() == 0


def test_bad_input_is_named(case, bridge):
    batch = case.batch()
    features = bridge.encode_image(case.space.to_model(case.clean))
    for shape in ((4, 3, 32, 64), (3, 64, 64), (4, 3, 65, 65)):
        with pytest.raises(ValueError, match=r"reads \(N, 3, 64, 64\)"):
            bridge.encode_image(torch.zeros(shape))
    empty = dict(batch, labels=batch["labels"].clone())
    empty["labels"][2] = -100
    with pytest.raises(ValueError, match=r"row 2 of labels holds only -100"):
        bridge.fuse(features, **empty)
    with pytest.raises(ValueError, match=r"row 2 of labels"):
        bridge.encode_text(**empty)
    with pytest.raises(ValueError, match=r"129 tokens with its labels, the model's context is 128"):
        bridge.fuse(features, **case.batch(extra=129 - batch["input_ids"].shape[1]))


def test_a_model_without_values_is_refused(tiny_model):
    with torch.device("meta"):
        empty = type(tiny_model)(tiny_model.config)
    number = len(list(empty.parameters()))
    with pytest.raises(ValueError, match=rf"{number} parameters of LlavaFor.* on the meta device \(model\."):
        bridge_of(empty)
    whole = copy.deepcopy(tiny_model)
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.to("meta"))
    with pytest.raises(ValueError, match=r"1 parameters of .* on the meta device \(lm_head\.weight\)"):
        bridge_of(whole)


def test_a_model_without_the_protocol_is_refused_by_what_it_lacks():
    with pytest.raises(ValueError, match=r"Linear cannot be bridged.*no get_image_features.*no config\.image_token_id"):
        Bridge(nn.Linear(2, 2))
