import torch

from cmai_fast.attacks import Evaluation
from cmai_fast.attacks.state import Best


def offer(best: Best, images: list[float], fooled: list[bool], loss: list[float], rows: list[int]) -> None:
    at = Evaluation(torch.tensor(loss), ~torch.tensor(fooled))
    adv = torch.tensor(images).view(-1, 1, 1, 1)
    best.offer(adv, 10 * adv, at, torch.tensor(rows))
    assert torch.equal(best.model_input, 10 * best.adv)  # the two go together


def test_what_fools_comes_before_what_does_not_and_then_the_loss_decides():
    best = Best(torch.zeros(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))
    offer(best, [0.1, 0.2, 0.3], [False, False, True], [1.0, 2.0, 5.0], [0, 1, 2])
    # Row 1 gets worse, row 0 fools at a lower loss, row 2 loses its fooling at a higher one.
    offer(best, [0.4, 0.5, 0.6], [True, False, False], [0.5, 1.5, 9.0], [0, 1, 2])
    assert torch.equal(best.adv.flatten(), torch.tensor([0.4, 0.2, 0.3]))
    assert best.fooled.tolist() == [True, False, True] and best.loss.tolist() == [0.5, 2.0, 5.0]


def test_rows_of_a_smaller_batch_go_to_their_own_places():
    best = Best(torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1))
    offer(best, [0.1, 0.2], [False, False], [3.0, 3.0], [3, 1])
    offer(best, [0.5, 0.6, 0.7], [False, False, False], [2.0, 4.0, 1.0], [3, 1, 0])
    assert torch.equal(best.adv.flatten(), torch.tensor([0.7, 0.6, 0.0, 0.1]))


def test_an_undefined_loss_replaces_nothing_unless_it_fools():
    best = Best(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    offer(best, [0.1, 0.2], [False, False], [1.0, 1.0], [0, 1])
    offer(best, [0.3, 0.4], [False, True], [float("nan"), float("nan")], [0, 1])
    assert torch.equal(best.adv.flatten(), torch.tensor([0.1, 0.4]))
