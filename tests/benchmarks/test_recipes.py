"""The recipes run for hours; a few steps of the tiny model show that they still fit the library."""

import sys
from pathlib import Path

import pytest
import torch

from cmai_fast.evaluation.subject import Subject


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "recipes"))
    yield
    for name in ("harden_vision", "full_strength", "build_easyvqa_llava"):
        sys.modules.pop(name, None)


def test_hardening_trains_the_tower_alone_and_appears_whole(recipes, make_tiny, tmp_path, monkeypatch):
    import harden_vision

    model, processor = make_tiny()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "tiny")
    settings = {"steps": 20, "lr": 1e-3, "inner_steps": 1, "batch": 4}

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(harden_vision, "write_results", full_disk)
        with pytest.raises(OSError, match="no space"):
            harden_vision.harden(str(tmp_path / "tiny"), tmp_path / "a", 8 / 255, 5, **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        harden_vision.harden(str(tmp_path / "tiny"), tmp_path / name, 8 / 255, seed, **settings)
    weights = {k: Subject.load(str(tmp_path / k)).model.state_dict() for k in ("tiny", "a", "b", "c")}
    moved = {name for name, value in weights["a"].items() if not torch.equal(value, weights["tiny"][name])}
    assert moved and all("vision_tower" in name for name in moved)
    assert all(torch.equal(value, weights["b"][name]) for name, value in weights["a"].items())
    assert any(not torch.equal(value, weights["c"][name]) for name, value in weights["a"].items())
    harden_vision.harden(str(tmp_path / "tiny"), tmp_path / "a", 8 / 255, 5, **settings)  # there already: it stays
    with pytest.raises(ValueError, match=r"other settings.*name another folder"):
        harden_vision.harden(str(tmp_path / "tiny"), tmp_path / "a", 16 / 255, 5, **settings)


def test_the_attack_on_the_probe_stays_in_the_ball_and_raises_its_loss(recipes, make_tiny):
    import harden_vision

    probe = harden_vision.Probe(make_tiny()[0].model.vision_tower)
    clean = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, -1]), torch.tensor([0, 1, 2, -1, 0, 1])
    adv = harden_vision.attack(probe, clean, *labels, 8 / 255, 5, 0)
    assert (adv - clean).abs().max() <= 8 / 255 + 1e-6
    assert adv.min() >= 0 and adv.max() <= 1
    assert probe.loss(adv, *labels) > probe.loss(clean, *labels)
    assert all(p.requires_grad and p.grad is None for p in probe.parameters())


def test_work_of_other_settings_is_not_taken_for_this_run(recipes, tmp_path):
    import full_strength

    settings = full_strength.settings_of("fgsm-rs", 16 / 255, 0, tmp_path)
    for _ in range(2):
        full_strength.claim(tmp_path / "work", settings)
    with pytest.raises(ValueError, match=r"begun with other settings.*--work"):
        full_strength.claim(tmp_path / "work", full_strength.settings_of("fgsm-rs", 8 / 255, 0, tmp_path))


def test_every_defence_of_the_table_has_settings_that_the_trainer_takes(recipes, tmp_path):
    import full_strength

    from cmai_fast.evaluation.experiment import training_arguments

    for defence in full_strength.DEFENCES:
        settings = full_strength.settings_of(defence, 16 / 255, 3, tmp_path)
        args = training_arguments(settings, tmp_path)
        assert (args.eps, args.seed, args.muon) == (16 / 255, 3, True)
        assert (settings.model == "easyvqa-llava") == (defence not in ("hardened", "immune"))
