"""CUDA graphs of the vision side: where they run, and what is refused. `tests/test_on_gpu.py` runs them."""

from __future__ import annotations

import pytest
import torch

from cmai_fast.attacks import exact_gradient
from cmai_fast.bridge.graphs import EncoderGraphs
from cmai_fast.mbat import MBATConfig


class Recorded:
    """In place of `EncoderGraphs`."""

    def __init__(self) -> None:
        self.asked = self.ran = 0

    def of(self, bridge, model_input):
        self.asked += 1

        def run(images):
            self.ran += 1
            return bridge.encode_image(images)

        return run


def test_a_graph_runs_where_the_gradient_of_all_images_is_asked_for(make_victim) -> None:
    victim, graphs = make_victim(), Recorded()
    images = victim.space.to_model(victim.pixels())
    expected, _ = exact_gradient(victim, images)
    victim.graphs = graphs
    for _ in range(2):
        found, _ = exact_gradient(victim, images)
        assert torch.equal(found, expected)
    assert (graphs.asked, graphs.ran) == (1, 2)
    victim(images)  # no gradient
    rows = torch.tensor([0, 2])
    exact_gradient(victim, images[rows], rows)  # another number of images than was captured
    assert (graphs.asked, graphs.ran) == (1, 2)


def test_each_attack_of_a_trainer_uses_the_same_graphs(make_trainer, batch, monkeypatch) -> None:
    trainer = make_trainer(beta=0.0, gamma=0.0, arm=False, inner="bridge", inner_steps=3)
    monkeypatch.setattr("cmai_fast.mbat.trainer.check_graphs", lambda trainer: None)
    trainer._graphs, trainer.args.cuda_graphs = Recorded(), True
    for _ in range(2):
        trainer.training_step(trainer.model, batch)
    assert (trainer._graphs.asked, trainer._graphs.ran) == (2, 6)  # asked once per victim


def test_graphs_of_a_batch_that_did_not_fit_are_let_go(make_trainer, batch, monkeypatch) -> None:
    """They would keep the memory of its passes."""
    trainer = make_trainer(beta=0.0, gamma=0.0, arm=False, inner="bridge", inner_steps=3)
    monkeypatch.setattr("cmai_fast.mbat.trainer.check_graphs", lambda trainer: None)
    monkeypatch.setattr("cmai_fast.mbat.consistency.EncoderGraphs", Recorded)
    trainer.args.cuda_graphs, branch, first = True, trainer._adversarial_branch, []

    def scarce(leaf, *rest):
        if len(leaf) > 2:
            first.append(trainer._graphs)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return branch(leaf, *rest)

    monkeypatch.setattr(trainer, "_adversarial_branch", scarce)
    with pytest.warns(RuntimeWarning, match="takes at most 2 at once"):
        trainer.training_step(trainer.model, batch)
    assert len(first) == 1 and trainer._graphs is not first[0] and trainer._graphs.ran == 6


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"recompute": "full"}, "recompute is 'full' and cuda_graphs True; expected recompute 'none'"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is True and cuda_graphs True; expected .* False"),
        ({"inner": "none"}, "inner is 'none' and cuda_graphs True; expected inner pgd, bridge or fgsm"),
        ({"modality": "text"}, "modality is 'text' and cuda_graphs True; expected modality image or both"),
    ],
)
def test_what_cannot_be_captured_is_refused(tmp_path, settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        MBATConfig(output_dir=str(tmp_path), report_to="none", cuda_graphs=True, **settings)


def test_whether_they_can_be_captured_is_known_before(tmp_path, monkeypatch) -> None:
    def can(**settings) -> bool:
        return MBATConfig(output_dir=str(tmp_path), report_to="none", **settings).can_capture

    assert not can()  # on a CPU
    monkeypatch.setattr(MBATConfig, "device", torch.device("cuda"))
    monkeypatch.setattr(MBATConfig, "world_size", 1)
    assert can() and can(inner="none", consistency_steps=5)
    assert not any((can(recompute="full"), can(gradient_checkpointing=True), can(inner="none"), can(modality="text")))
    monkeypatch.setattr(MBATConfig, "world_size", 2)
    assert not can()


def test_a_vision_side_that_cannot_be_captured_is_named(make_victim, monkeypatch) -> None:
    victim = make_victim()
    monkeypatch.setattr("torch.is_autocast_enabled", lambda kind: False)

    def fails(error):
        def capture(*args):
            raise error

        monkeypatch.setattr("torch.cuda.make_graphed_callables", capture)
        EncoderGraphs().of(victim.bridge, victim.space.to_model(victim.pixels()))

    with pytest.raises(RuntimeError, match=r"LlavaFor.* as a CUDA graph \(no capture\); set cuda_graphs to False"):
        fails(RuntimeError("no capture\nmore"))
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):  # the step then runs in parts
        fails(torch.OutOfMemoryError("CUDA out of memory"))


def test_a_cpu_has_no_graphs(make_trainer) -> None:
    with pytest.raises(ValueError, match="cuda_graphs is True, and the device is cpu"):
        make_trainer(cuda_graphs=True)
