"""Attacks of other libraries and ours: the same classifier, budget and process. `recipes/peers.py` says how to install
them, and compares their strength."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from cmai_fast.attacks import ATTACKS
from cmai_fast.data.sources import DataSource
from cmai_fast.evaluation.overhead import SavedActivations, stepper
from cmai_fast.evaluation.protocol import measure
from cmai_fast.evaluation.suite import AttackSpec
from cmai_fast.evaluation.suites import suite
from cmai_fast.mbat import MBATConfig
from cmai_fast.pipeline import Pipeline
from cmai_fast.threat import ThreatModel
from cmai_fast.workflows.samples import asked, training_batches, training_samples

THREAT = ThreatModel("linf", 8 / 255)
MOST = {"torchattacks": 1.0, "foolbox": 0.72, "adversarial-robustness-toolbox": 0.72}  # of their time
MOST_SAVED = 0.65  # of the activations that torchattacks saves
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["vit", "easyvqa-llava"])
def test_pgd_10(side_by_side, peers, name: str) -> None:
    """8/255, steps of 2/255, from the clean image, 32 pictures, nothing stops early."""
    x, y = peers.pictures(32)
    model = (peers.vit() if name == "vit" else peers.Colours(Pipeline.load(name))).eval()
    labels, classes = (model(x).argmax(1).detach(), 10) if name == "vit" else (y, 8)
    ours = functools.partial(
        ATTACKS["pgd"], peers.victim_of(model, labels, classes), x, THREAT, steps=10, step_size=2 / 255,
        random_start=False, early_stop=False,
    )  # fmt: skip
    theirs = {peer: peers.pgd_of(peer, model, x, labels, classes) for peer in MOST if peers.installed(peer)}
    if not theirs:
        pytest.skip(f"none of {', '.join(MOST)} is installed")
    figures = {}
    if "torchattacks" in theirs:
        peaks = []
        for run in (ours, theirs["torchattacks"]):
            with SavedActivations(model) as held:
                run()
            peaks.append(held.peak)
        figures["saved activations of torchattacks"] = (peaks[0] / peaks[1], "at most", MOST_SAVED)
    side_by_side(
        f"PGD-10 of 32 pictures, {name}",
        {"cmai_fast": ours, **theirs},
        device=CPU,
        targets={peer: ("at most", MOST[peer]) for peer in theirs},
        figures=figures,
        rounds=7,
    )


def test_a_training_step_with_exact_pgd(side_by_side, peers, tmp_path: Path) -> None:
    """K = 10, the same loss: against PyTorch with torchattacks' PGD, as one writes it."""
    if not peers.installed("torchattacks"):
        pytest.skip("torchattacks is not installed")
    subject, plain = (Pipeline.load("easyvqa-llava") for _ in range(2))
    batch = next(training_batches(subject, training_samples(DataSource("easyvqa"), "vqa"), 64, 0))
    args = MBATConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, eps=8 / 255, learning_rate=1e-5)
    changes = {"inner": "pgd", "inner_step_size": 2 / 255, "beta": 0.0, "gamma": 0.0, "arm": False}
    model, ours = stepper(subject, args, changes)
    ways = {"MBATTrainer": lambda: ours(batch), "plain PyTorch": peers.plain_step(plain, batch, 8 / 255)}
    kept = []
    for run, m in zip(ways.values(), (model, plain.model), strict=True):
        with SavedActivations(m) as held:
            run()
        kept.append(held.peak)
    side_by_side(
        "a training step with exact PGD, K = 10, easyvqa-llava, batch 64",
        ways,
        device=CPU,
        targets={"plain PyTorch": ("at most", 0.8)},
        figures={"activations saved at most, of plain PyTorch's": (kept[0] / kept[1], "at most", 0.6)},
        rounds=5,
    )


@pytest.mark.parametrize(
    ("name", "eps", "most"),
    [("easyvqa-llava", 16, 0.5), ("easyvqa-llava-immune", 16, 0.7), ("easyvqa-llava-immune", 32, 0.7)],
)
def test_fooled_pictures_leave_the_batch(side_by_side, peers, name: str, eps: int, most: float) -> None:
    """APGD-50, 64 pictures: the same robust accuracy with and without. Passes are what time cannot fall below: of a
    model that hardly anything fools, hardly anything leaves."""
    x, y = peers.pictures(64)
    model = peers.Colours(Pipeline.load(name)).eval()
    ways = {}
    for way, stop in (("fooled ones leave", True), ("all stay", False)):
        plan = [AttackSpec("apgd", 50, settings={"early_stop": stop})]
        ways[way] = functools.partial(peers.robust, model, plan, x, y, eps / 255)
    found = {way: run() for way, run in ways.items()}
    assert len({record["final"] for record in found.values()}) == 1
    left = [found[way]["forward_per_image"] for way in ways]
    side_by_side(
        f"APGD-50 of 64 pictures at {eps}/255, {name}, {found['all stay']['final']:.0%} robust",
        ways,
        device=CPU,
        targets={"all stay": ("at most", most)},
        figures={"passes, of all stay": (left[0] / left[1], "at most", most)},
        rounds=3,
    )


def test_the_protocol_of_robustvlm_in_batches(side_by_side) -> None:
    """The suite at 8/255 on 32 questions, in one batch and at batch size 1 as in the original program."""
    pipeline = Pipeline.load("easyvqa-llava")
    samples = asked(DataSource("easyvqa"), "test", "vqa", 32)
    run = functools.partial(measure, pipeline, samples, THREAT, suite("robustvlm", "vqa"))
    verdicts = []

    def at(size: int) -> None:
        record = run(batch_size=size).record
        verdicts.append({key: (a["attacked"], a["broken"]) for key, a in record["attacks"].items()})

    side_by_side(
        "the protocol of RobustVLM, easyvqa-llava, 32 questions",
        {"batches of 32": lambda: at(32), "batches of 1": lambda: at(1)},
        device=CPU,
        targets={"batches of 1": ("at least", 5.0)},
        rounds=2,
    )
    assert all(v == verdicts[0] for v in verdicts)
