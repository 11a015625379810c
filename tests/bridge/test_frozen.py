import pytest
import torch
from torch import nn

from cmai_fast.bridge import frozen


def make() -> nn.Sequential:
    """Modes and requires_grad mixed; one gradient is set, the other None."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), nn.Linear(2, 2))
    model.train()
    model[1].training = False  # a frozen block in a model in training, its child still in training
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones(2, 2)
    return model


def state(model: nn.Module) -> tuple:
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [b.tolist() for b in model.buffers()],
    )


def test_inside_nothing_trains_and_outside_all_is_as_before():
    model, other = make(), nn.Linear(1, 1)
    before, grad = state(model), model[2].weight.grad
    with frozen(model, None, other):
        assert not any(m.training for m in (*model.modules(), *other.modules()))
        assert not any(p.requires_grad for p in (*model.parameters(), *other.parameters()))
        model(torch.randn(4, 2))
    assert state(model) == before and model[2].weight.grad is grad
    assert other.training and other.weight.requires_grad


def test_modules_that_answer_train_in_their_own_way_are_restored_too():
    class Stubborn(nn.Module):
        def train(self, mode: bool = True):
            return super().train(False)

    model = nn.Sequential(Stubborn())
    model.training = model[0].training = True
    with frozen(model):
        assert not model[0].training
    assert model.training and model[0].training


def test_restores_after_an_exception():
    model = make()
    before = state(model)
    with pytest.raises(RuntimeError, match="boom"), frozen(model):
        raise RuntimeError("boom")
    assert state(model) == before


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_autograd_works_inside_and_the_caller_keeps_his_mode(around):
    model = make()
    before = state(model)
    with around():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with frozen(model):
            x = torch.ones(1, 2, requires_grad=True)
            (grad,) = torch.autograd.grad(model(x).sum(), x)
        assert grad.abs().sum() > 0
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    assert state(model) == before


def test_can_be_nested():
    model = make()
    before = state(model)
    with frozen(model):
        with frozen(model):
            pass
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert state(model) == before
