import math

import pytest
import torch
import torch.nn.functional as F

from cmai_fast.cmcv import ConsistencyHeads, contrastive_loss, packed_text, same_text


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return ConsistencyHeads(6, 6, dim=4, hidden=8)


def by_hand(scale, image, text, negative=None, same=None):
    """The definition, one pair at a time, in float64."""
    image, text = F.normalize(image.double(), dim=-1), F.normalize(text.double(), dim=-1)
    n, scale = len(image), scale.item()
    in_batch = answers = 0.0
    for i in range(n):
        rivals = [j for j in range(n) if j == i or same is None or not same[i, j]]
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


SAME = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("same", [None, SAME])
def test_loss_is_its_definition(heads, negatives, same):
    image, text = torch.randn(3, 4), torch.randn(3, 4)
    negative = torch.randn(3 * negatives, 4) if negatives else None
    loss = contrastive_loss(heads, image, text, negative, same_text=same)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(by_hand(heads.scale, image, text, negative, same), rel=1e-5)


def test_the_fused_path_and_the_masked_path_agree_in_value_and_gradient(heads):
    results = []
    for same in (None, torch.eye(3, dtype=torch.bool)):
        torch.manual_seed(1)
        image, text = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        heads.logit_scale.grad = None
        loss = contrastive_loss(heads, image, text, same_text=same)
        loss.backward()
        results.append((loss.detach(), image.grad, text.grad, heads.logit_scale.grad))
    for fused, masked in zip(*results, strict=True):
        torch.testing.assert_close(fused, masked)


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


def test_same_text_ignores_padding_but_not_tokens():
    ids = torch.tensor([[9, 1, 2], [1, 2, 0], [3, 1, 2], [1, 1, 2]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert torch.equal(same_text(packed_text(ids, mask)), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"text": torch.randn(2, 4)},
        {"text_negative": torch.randn(4, 4)},
        {"text_negative": torch.randn(0, 4)},
        {"text_negative": torch.randn(3, 5)},
        {"same_text": torch.ones(2, 2, dtype=torch.bool)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(heads, change):
    with pytest.raises(ValueError, match="expected"):
        contrastive_loss(heads, **({"image": torch.randn(3, 4), "text": torch.randn(3, 4)} | change))
