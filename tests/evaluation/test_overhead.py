"""What a step costs: bytes that autograd holds, counted by hand on small graphs, and MBAT against a clean step."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from cmai_fast.cmcv import Verifier
from cmai_fast.data import VQACollator, load_dataset
from cmai_fast.defences import DEFENCES
from cmai_fast.evaluation.overhead import CLEAN_STEP, SavedActivations, step_overhead
from cmai_fast.mbat import MBATConfig

FLOAT = 4


def test_a_linear_layer_saves_its_input():
    layer = nn.Linear(5, 7)
    x = torch.rand(3, 5)
    with SavedActivations(layer) as held:
        y = layer(x)  # the weight is saved only where the input needs a gradient, and is a parameter
        assert held.live == held.peak == 3 * 5 * FLOAT
        y.sum().backward()
        del y
    gc.collect()
    assert held.live == 0 and held.peak == 3 * 5 * FLOAT


def test_a_tensor_saved_twice_is_counted_once():
    x = torch.rand(10, requires_grad=True)
    with SavedActivations(nn.Identity()) as held:
        h = x * 1.0  # saves nothing: the other factor is a number
        y = h.sin() + h.cos() + h.view(2, 5).exp().sum()  # h for sin and cos; exp saves its result
        assert held.live == 2 * 10 * FLOAT
        y.sum().backward()
    assert held.live == 0


def test_parameters_are_not_counted():
    layer = nn.Linear(5, 7)
    x = torch.rand(3, 5, requires_grad=True)
    with SavedActivations(layer) as held:
        layer(x)
    other = SavedActivations(nn.Identity())
    with other:
        layer(x)
    assert held.peak == 3 * 5 * FLOAT and other.peak == (3 * 5 + 7 * 5) * FLOAT


def test_peak_is_over_what_lives_at_the_same_time():
    x = torch.rand(100, requires_grad=True)
    with SavedActivations(nn.Identity()) as held:
        for _ in range(5):
            x.exp().sum().backward()
    one = held.peak
    with SavedActivations(nn.Identity()) as held:
        losses = [x.exp().sum() for _ in range(5)]
        sum(losses).backward()
    assert one == 100 * FLOAT and held.peak == 5 * one


def test_recomputation_lowers_the_peak():
    from torch.utils.checkpoint import checkpoint

    layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)))
    x = torch.rand(8, 32, requires_grad=True)
    peaks = []
    for recompute in (False, True):
        with SavedActivations(layers) as held:
            h = x
            for layer in layers:
                h = checkpoint(layer, h, use_reentrant=False) if recompute else layer(h)
            h.sum().backward()
        peaks.append(held.peak)
    assert peaks[1] < peaks[0]


@pytest.fixture
def batch(subject):
    data = load_dataset("easyvqa", "train", 4)
    return VQACollator(subject.processor, negatives=1)([data[i] for i in range(4)])


def config(tmp_path, **changes):
    return MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **changes)


def test_overhead_of_mbat(subject, batch, tmp_path):
    before = {k: v.clone() for k, v in (*subject.model.state_dict().items(), *subject.heads.state_dict().items())}
    args = config(tmp_path, inner="pgd", inner_steps=5)
    cost = step_overhead(subject, args, batch, rounds=3)
    assert cost["time_ratio"] == pytest.approx(cost["mbat_step_s"] / cost["clean_step_s"])
    assert cost["time_ratio"] > 2  # five full passes more, forward and backward
    assert cost["memory_ratio"] == pytest.approx(cost["mbat_saved_bytes"] / cost["clean_saved_bytes"])
    assert cost["memory_ratio"] > 1
    assert "3 rounds, alternating, medians; memory" in cost["protocol"] and "batch 4" in cost["protocol"]
    after = {**subject.model.state_dict(), **subject.heads.state_dict()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert args.inner == "pgd" and args.gamma == 0.1  # the clean run has its own copy


@pytest.mark.parametrize("defence", list(DEFENCES))
def test_any_step_becomes_a_clean_one(defence, tmp_path):
    """One setting after the other, as `stepper` does it; with CUDA graphs, as on a GPU."""
    values = DEFENCES[defence].values
    args = config(tmp_path, **{"cuda_graphs": values.get("inner") != "none", **values})
    for name, value in CLEAN_STEP.items():
        setattr(args, name, value)
    assert args.inner == "none" and not args.cuda_graphs


def test_overhead_says_over_which_steps_its_time_is_a_mean(subject, tmp_path):
    data = load_dataset("easyvqa", "train", 4)
    verifier = Verifier.for_data(subject.model, subject.processor, data, width=16, hidden=16, dim=8, heads=2)
    batch = VQACollator(subject.processor, statements=verifier.statements)([data[i] for i in range(4)])
    args = config(tmp_path, inner_steps=1, beta=0.0, arm=False, consistency_steps=2, anchor=1.0)
    said = step_overhead(subject, args, batch, heads=verifier, rounds=1)["protocol"]
    assert "time of MBAT: the mean over a full step and the 2 on S_c alone" in said


def test_a_clean_step_costs_what_a_clean_step_costs(subject, batch, tmp_path):
    """Where MBAT has nothing to do, both sides of the ratio are the same work."""
    args = config(tmp_path, inner="none", gamma=0.0, beta=0.0, arm=False)
    cost = step_overhead(subject, args, batch, rounds=1)
    assert cost["memory_ratio"] == 1.0
