import math

import pytest
import torch
import torch.nn.functional as F

from cmai_fast.cmcv import ConsistencyHeads, contrastive_loss, packed_text, text_groups


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return ConsistencyHeads(6, 6, dim=4, hidden=8)


def by_hand(scale, image, text, negative=None, groups=None):
    """The definition, one pair at a time, in float64."""
    image, text = F.normalize(image.double(), dim=-1), F.normalize(text.double(), dim=-1)
    n, scale = len(image), scale.item()
    in_batch = answers = 0.0
    for i in range(n):
        rivals = [j for j in range(n) if j == i or groups is None or groups[i] != groups[j]]
        own = scale * float(image[i] @ text[i])
        texts = [scale * float(image[i] @ text[j]) for j in rivals]
        images = [scale * float(image[j] @ text[i]) for j in rivals]
        in_batch += (math.log(sum(map(math.exp, texts))) + math.log(sum(map(math.exp, images))) - 2 * own) / (2 * n)
        if negative is not None:
            k = len(negative) // n
            wrong = F.normalize(negative.double(), dim=-1)[i * k : (i + 1) * k]
            choices = [own, *(scale * float(image[i] @ w) for w in wrong)]
            answers += (math.log(sum(map(math.exp, choices))) - own) / n
    return in_batch if negative is None else 0.2 * in_batch + answers


GROUPS = torch.tensor([4, 0, 4])


@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_loss_is_its_definition(heads, negatives, groups):
    image, text = torch.randn(3, 4), torch.randn(3, 4)
    negative = torch.randn(3 * negatives, 4) if negatives else None
    loss = contrastive_loss(heads, image, text, negative, groups=groups)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(by_hand(heads.scale, image, text, negative, groups), rel=1e-5)


def masked(heads, image, text, same):
    """The in-batch part over the whole matrix of logits, equal texts masked."""
    logits = heads.scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    logits = logits.masked_fill(same & ~torch.eye(len(image), dtype=torch.bool), float("-inf"))
    own = torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@pytest.mark.parametrize("groups", ["each its own", "some alike", "all alike"])
def test_equal_texts_are_masked_in_value_and_gradient(heads, groups):
    n = 37
    number = {"each its own": torch.arange(n), "some alike": torch.arange(n) * 5 % 11, "all alike": torch.zeros(n)}
    ids = number[groups].long()
    image, text = torch.randn(n, 4), torch.randn(n, 4)
    by_operator, right = [], []
    for dtype, found in ((torch.float32, by_operator), (torch.float64, right)):
        leaves = [value.to(dtype).requires_grad_() for value in (image, text)]
        its = heads.to(dtype)
        if found is right:
            loss = masked(its, *leaves, ids[:, None] == ids)
        else:
            loss = contrastive_loss(its, *leaves, groups=ids)
        found += [loss, *torch.autograd.grad(loss, [*leaves, its.logit_scale])]
    for got, exact in zip(by_operator, right, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-5, atol=1e-6)


def test_a_wrong_answer_is_no_negative_for_another_row(heads):
    image, text, negative = torch.randn(3, 4), torch.randn(3, 4), torch.randn(6, 4, requires_grad=True)
    image.requires_grad_()
    contrastive_loss(heads, image, text, negative).backward()
    before = image.grad.clone()
    image.grad = None
    changed = negative.detach().clone()
    changed[2:4] = torch.randn(2, 4)  # those of row 1
    contrastive_loss(heads, image, text, changed).backward()
    torch.testing.assert_close(image.grad[[0, 2]], before[[0, 2]])
    assert not torch.allclose(image.grad[1], before[1])


def test_training_by_it_makes_wrong_answers_score_low(heads):
    images, texts, wrong = torch.randn(8, 2, 6), torch.randn(8, 6), torch.randn(16, 6)
    optimizer = torch.optim.Adam(heads.parameters(), 1e-2)
    for _ in range(400):
        v, t, negative = heads.project_image(images), heads.project_text(texts), heads.project_text(wrong)
        loss = contrastive_loss(heads, v, t, negative)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        v, t, negative = heads.project_image(images), heads.project_text(texts), heads.project_text(wrong)
        right = heads.score(v, t)
        assert right.min() > heads.score(v.repeat_interleave(2, 0), negative).max()
        assert right.min() > heads.score(v, t.roll(1, 0)).max()


def test_groups_of_texts_ignore_padding_but_not_tokens():
    ids = torch.tensor([[9, 1, 2], [1, 2, 0], [3, 1, 2], [1, 1, 2]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    first, second, *others = text_groups(packed_text(ids, mask)).tolist()
    assert first == second and len({first, *others}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"text": torch.randn(2, 4)},
        {"text_negative": torch.randn(4, 4)},
        {"text_negative": torch.randn(0, 4)},
        {"text_negative": torch.randn(3, 5)},
        {"groups": torch.ones(2, dtype=torch.long)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(heads, change):
    with pytest.raises(ValueError, match="expected"):
        contrastive_loss(heads, **({"image": torch.randn(3, 4), "text": torch.randn(3, 4)} | change))
