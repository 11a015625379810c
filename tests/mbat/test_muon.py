"""MuonAdamW steps as the two optimisers of PyTorch, and is saved, resumed and scheduled as one."""

import copy

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from cmai_fast.mbat.muon import MuonAdamW, hidden_matrices, orthogonal


@pytest.fixture
def model():
    torch.manual_seed(0)
    alike = (nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), *alike, nn.Linear(4, 5, bias=False))


def split(model):
    matrices = hidden_matrices(model)
    return [{"params": matrices}], [{"params": [p for p in model.parameters() if all(p is not m for m in matrices)]}]


def take_step(model, optimizer, seed):
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def orthogonal_alone(matrix, *settings):
    return orthogonal(matrix[None], *settings)[0]


def test_each_part_steps_as_the_optimiser_of_pytorch(model, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonal_alone)  # theirs is in bfloat16
    monkeypatch.setattr("cmai_fast.mbat.muon._ELEMENTS", 40)  # two of the three of one shape at once
    plain = copy.deepcopy(model)
    matrices, others = split(plain)
    parts = (
        torch.optim.Muon(matrices, 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([others[0] | {"weight_decay": 0.3}], 0.01, (0.8, 0.9), 1e-6),
    )
    matrices, others = split(model)
    others = [others[0] | {"weight_decay": 0.3}]
    mine = MuonAdamW(matrices, others, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    before = [p.clone() for p in model.parameters()]
    for seed in range(3):
        take_step(model, mine, seed)
        for part in parts:
            part.zero_grad()
        plain(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        for part in parts:
            part.step()
    for p, expected, old in zip(model.parameters(), plain.parameters(), before, strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-8)
        assert not torch.equal(p, old)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_an_update_is_made_orthogonal_by_the_iteration_of_pytorch(shape):
    torch.manual_seed(0)
    settings = (3.4445, -4.775, 2.0315), 5, 1e-7
    update = torch.randn(shape)
    theirs = _zeropower_via_newtonschulz(update, *settings)
    assert torch.equal(orthogonal_alone(update.bfloat16(), *settings), theirs)
    values = torch.linalg.svdvals(orthogonal_alone(update, *settings))
    assert values.min() > 0.4 and values.max() < 1.6


def test_a_saved_state_goes_on_exactly(model):
    optimizer = MuonAdamW(*split(model), lr=0.01)
    take_step(model, optimizer, 0)
    other = copy.deepcopy(model)
    resumed = MuonAdamW(*split(other), lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        take_step(m, o, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_copy_steps_as_the_original(model):
    pair = [(model, MuonAdamW(*split(model), lr=0.01))]
    take_step(*pair[0], 0)
    pair.append(copy.deepcopy(pair[0]))
    for m, o in pair:
        take_step(m, o, 1)
    assert all(torch.equal(a, b) for a, b in zip(pair[0][0].parameters(), pair[1][0].parameters(), strict=True))


@pytest.mark.parametrize("kept", [0, 1])
def test_one_kind_may_be_empty_and_be_filled_later(model, kept):
    parts = split(model)
    optimizer = MuonAdamW(*(part if i == kept else [{"params": []}] for i, part in enumerate(parts)), lr=0.01)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.ones(3)
    before = [p.detach().clone() for p in model.parameters()]
    take_step(model, optimizer, 0)  # clears the gradient of `late` first
    late.grad = torch.ones(3)
    optimizer.step()
    moved = {i for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)) if not torch.equal(p, old)}
    known = [p for group in parts[kept] for p in group["params"]]
    assert moved == {i for i, p in enumerate(model.parameters()) if any(p is k for k in known)}
    torch.testing.assert_close(late.detach(), torch.full((3,), 0.5))


def test_hooks_run_once_a_step(model):
    optimizer, calls = MuonAdamW(*split(model), lr=0.01), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    take_step(model, optimizer, 0)
    assert calls == [1]


def test_a_schedule_moves_the_rate_of_both_parts(model):
    optimizer = MuonAdamW(*split(model), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    take_step(model, optimizer, 0)
    schedule.step()
    before = [p.clone() for p in model.parameters()]
    take_step(model, optimizer, 1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_group_added_later_is_stepped_by_adamw_once(model):
    (matrices,), others = split(model)
    first, *_, second = matrices["params"]
    optimizer = MuonAdamW([{"params": [first]}], others, lr=0.01)
    optimizer.add_param_group({"params": [second], "lr": 0.03})
    old = second.detach().clone()
    take_step(model, optimizer, 0)
    torch.testing.assert_close((second - old).abs(), torch.full_like(old, 0.03), rtol=1e-3, atol=0)


def test_hidden_matrices_are_the_trainable_linear_weights_but_the_output_layer(make_tiny):
    model, _ = make_tiny()
    frozen = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    frozen.requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p] for p in hidden_matrices(model)}
    assert names[frozen] not in found
    assert not any("embed" in name or "lm_head" in name for name in found)
    expected = {
        name
        for name, p in model.named_parameters()
        if p.ndim == 2 and p.requires_grad and "embed" not in name and "lm_head" not in name
    }
    assert found == expected and len(found) > 8


def test_shared_weights_count_once_and_never_where_they_are_embeddings():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b, self.head = nn.Embedding(4, 4), *(nn.Linear(4, 4) for _ in range(3))
            self.b.weight, self.head.weight = self.a.weight, self.embed.weight

    model = Tied()
    assert len(hidden_matrices(model)) == 1
    assert hidden_matrices(model)[0] is model.a.weight
